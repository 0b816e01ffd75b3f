// The server's protocol: requests, errors that name a field, the key, and events.

/** A request that the server rejected: `status`, the message, and the `field` that it is about, if any. */
export class Refused extends Error {
  constructor(status, detail, field = null, retryAfter = null) {
    super(detail);
    Object.assign(this, { status, field, retryAfter });
  }
}

/** The server could not be reached. */
export class Unreachable extends Error {}

let askForKey = null;
let asking = null;

/** Set the function that asks the user for the key; it resolves to the key, or null. */
export const onKeyNeeded = (ask) => (askForKey = ask);

async function send(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error; // it was cancelled here
    throw new Unreachable("the server does not respond");
  }
}

async function call(path, options = {}) {
  let response = await send(path, options);
  if (response.status === 401 && askForKey) {
    asking ??= openSession().finally(() => (asking = null)); // one dialog for all waiting requests
    await asking;
    response = await send(path, options);
  }
  if (response.ok) return response;
  let detail = response.statusText || `status ${response.status}`;
  let field = null;
  try {
    const body = await response.json();
    detail = body.detail ?? body.error?.message ?? body.error ?? detail;
    field = body.field ?? null;
  } catch {
    // a proxy's error page: only the status is known
  }
  throw new Refused(response.status, String(detail), field, response.headers.get("retry-after"));
}

async function openSession() {
  let problem = null;
  for (;;) {
    const key = await askForKey(problem);
    if (key === null) throw new Refused(401, "this server requires its key");
    const response = await send("/v1/session", { method: "POST", body: key });
    if (response.ok) return;
    problem =
      response.status === 401 ? "This is not the key of this server." : `The server returned ${response.status}.`;
  }
}

const json = async (path, options) => (await call(path, options)).json();
const post = (path, body) =>
  json(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });

export const options = () => json("/static/options.json");
export const server = () => json("/v1/server");
export const history = (limit, before) => json(`/v1/songs?limit=${limit}${before ? `&before=${before}` : ""}`);
export const record = (id) => json(`/v1/songs/${id}`);
export const cancel = (id) => json(`/v1/songs/${id}/cancel`, { method: "POST" });
export const remove = (id) => json(`/v1/songs/${id}`, { method: "DELETE" });
export const favourite = (id, index, yes) =>
  call(`/v1/songs/${id}/${index}/favourite`, { method: yes ? "PUT" : "DELETE" });
export const peaks = (id, index, count) => json(`/v1/songs/${id}/${index}/peaks?count=${count}`);
export const tokens = (texts) => post("/v1/tokens", texts);
export const uploadPath = (id, field) => `/v1/songs/${id}/uploads/${field}`;
export const blob = async (path) => (await call(path)).blob();
export const text = async (path) => (await call(path)).text();

/** Request songs; `files` has {blob, name} for each uploaded field. */
export function submit(body, files) {
  if (!Object.keys(files).length) return post("/v1/songs", body);
  const form = new FormData();
  form.append("request", JSON.stringify(body));
  for (const [field, file] of Object.entries(files)) form.append(field, file.blob, file.name || field);
  return json("/v1/songs", { method: "POST", body: form });
}

/**
 * Request a plan; `told` gets {status, stage, step, steps} after each step. Aborting cancels it.
 * It streams events, because a proxy may close a connection that is silent for long.
 */
export async function plan(request, told, signal) {
  const response = await call("/v1/plans", {
    method: "POST",
    headers: { "content-type": "application/json", accept: "text/event-stream" },
    body: JSON.stringify(request),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Unreachable("the connection ended before the plan was written");
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = /^data: (.*)$/m.exec(block)?.[1];
      if (data === undefined) continue; // a heartbeat
      const found = JSON.parse(data);
      if (found.status === "done") return found.plan;
      if (found.status === "failed") throw new Refused(500, found.error ?? "the plan could not be written");
      if (found.status === "cancelled") throw new DOMException("cancelled", "AbortError");
      told(found);
    }
  }
}

/**
 * Watch a record with server-sent events: `told` gets it after every change, `ended` is called after the last one.
 * The browser reconnects by itself. Returns a function that stops watching.
 */
export function watch(id, told, ended) {
  const events = new EventSource(`/v1/songs/${id}/events`);
  const final = ["done", "failed", "cancelled"];
  for (const name of ["queued", "running", ...final]) {
    events.addEventListener(name, (event) => {
      told(JSON.parse(event.data));
      if (final.includes(name)) stop();
    });
  }
  events.addEventListener("error", () => {
    if (events.readyState === EventSource.CLOSED) stop();
  });
  const stop = () => {
    events.close();
    ended();
  };
  return () => events.close();
}
