// The server's protocol: requests, errors that name a field, the key, and events.

/** What the server refused: `status`, the text, and the `field` that it is about, if any. */
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

/** Say what gets the key from the user: a function that resolves to its text, or null. */
export const onKeyNeeded = (ask) => (askForKey = ask);

async function send(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error; // it was cancelled here
    throw new Unreachable("the server does not answer");
  }
}

async function call(path, options = {}) {
  let response = await send(path, options);
  if (response.status === 401 && askForKey) {
    asking ??= openSession().finally(() => (asking = null)); // one dialog, however many requests wait for it
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
    // a proxy's page: the status says all that is known
  }
  throw new Refused(response.status, String(detail), field, response.headers.get("retry-after"));
}

async function openSession() {
  let problem = null;
  for (;;) {
    const key = await askForKey(problem);
    if (key === null) throw new Refused(401, "this server needs its key");
    const response = await send("/v1/session", { method: "POST", body: key });
    if (response.ok) return;
    problem =
      response.status === 401 ? "That is not the key of this server." : `The server answered ${response.status}.`;
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

/** Request songs; `files` has {blob, name} for each field that is uploaded. */
export function submit(body, files) {
  if (!Object.keys(files).length) return post("/v1/songs", body);
  const form = new FormData();
  form.append("request", JSON.stringify(body));
  for (const [field, file] of Object.entries(files)) form.append(field, file.blob, file.name || field);
  return json("/v1/songs", { method: "POST", body: form });
}

/**
 * Have a plan written of a request; `told` gets {status, stage, step, steps} at each step. Aborting cancels it.
 * Events come over one connection, because a proxy may end one that is silent for long.
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
      if (data === undefined) continue; // a sign of life
      const found = JSON.parse(data);
      if (found.status === "done") return found.plan;
      if (found.status === "failed") throw new Refused(500, found.error ?? "the plan could not be written");
      if (found.status === "cancelled") throw new DOMException("cancelled", "AbortError");
      told(found);
    }
  }
}

/**
 * Watch a record by server-sent events: `told` gets it at every change, `ended` is called when no more will come.
 * The browser connects again by itself. Returns a function that stops it.
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
