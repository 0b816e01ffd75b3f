// The planner's plan, if the server has a planner: written from the form, shown, and edited before generating.
import * as api from "./api.js";
import { announce, byId, el } from "./dom.js";
import { readValue } from "./request.js";

// The editable fields of a plan, by the names of a request's fields; a plan's caption replaces the prompt.
const WORDS = ["caption", "lyrics"];
const FACTS = ["audio_duration", "bpm", "keyscale", "timesignature", "vocal_language"];

/**
 * Return the panel: {show, use}.
 *
 * `request(withPlan)` returns the body that would be sent now; `planner()` returns whether the model has a planner;
 * `failed(error)` shows an error.
 */
export function createPlan(state, options, planner, request, changed, failed) {
  const box = byId("plan");
  const body = byId("plan-body");
  const write = byId("plan-write");
  const drop = byId("plan-drop");
  let writing = null; // cancels the request
  let stale = false;

  async function writePlan() {
    if (writing) return writing.abort();
    writing = new AbortController();
    show();
    announce("Writing the plan");
    try {
      state.plan = await api.plan(request(Boolean(state.plan && stale)), tell, writing.signal);
      stale = false;
      announce("The plan is finished");
      changed();
    } catch (error) {
      if (error.name === "AbortError") announce("Cancelled");
      else failed(error);
    } finally {
      writing = null;
      show();
      rebuild();
    }
  }

  function tell({ status, stage, step, steps }) {
    const text = status === "queued" ? "Waiting" : steps ? `${stage}: ${step} of ${steps}` : stage;
    byId("plan-progress").textContent = `${text}…`;
  }

  function set(name, value) {
    if (value === undefined) delete state.plan[name];
    else state.plan[name] = value;
    if (!stale && state.plan.audio_codes?.length) {
      stale = true;
      byId("plan-stale").hidden = false;
    }
    changed();
  }

  function field(name) {
    const about = options.fields[name === "caption" ? "prompt" : name];
    const id = `plan-${name}`;
    const value = state.plan[name] ?? "";
    const input = WORDS.includes(name)
      ? el("textarea", { id, rows: name === "lyrics" ? 8 : 3 })
      : el("input", { id, type: "text", autocomplete: "off" });
    input.value = value;
    input.addEventListener("input", () =>
      set(name, WORDS.includes(name) ? input.value : readValue(about, input.value)),
    );
    const label = name === "caption" ? "Caption" : about.label;
    return el(
      "div",
      { class: `field${WORDS.includes(name) ? " wide" : ""}` },
      el("label", { htmlFor: id }, label),
      input,
    );
  }

  function rebuild() {
    const plan = state.plan;
    if (!plan) return body.replaceChildren();
    const codes = plan.audio_codes?.length ?? 0;
    const about = codes ? `${codes} audio codes, ${codes / 5} s of music` : "no audio codes: text only";
    body.replaceChildren(
      el("div", { class: "fields" }, [...WORDS, ...FACTS].map(field)),
      el(
        "p",
        { class: "hint" },
        plan.score === null || plan.score === undefined
          ? about
          : `${about}; they match the text by ${Math.round(100 * plan.score)} %`,
      ),
      el(
        "p",
        { class: "hint", id: "plan-stale", hidden: !stale },
        "The codes were written for the earlier text. “Rewrite” writes new codes.",
      ),
    );
  }

  function show() {
    box.hidden = state.task !== "text2music" || !planner();
    box.setAttribute("aria-busy", Boolean(writing));
    write.textContent = writing ? "Cancel" : state.plan ? "Rewrite" : "Write a plan";
    byId("plan-progress").hidden = !writing;
    drop.hidden = !state.plan || Boolean(writing);
  }

  write.addEventListener("click", writePlan);
  drop.addEventListener("click", () => {
    state.plan = null;
    stale = false;
    rebuild();
    show();
    changed();
    write.focus();
  });

  return {
    show() {
      rebuild();
      show();
    },
    /** Show an existing plan, to edit it. */
    use(plan) {
      state.plan = plan;
      stale = false;
      rebuild();
      show();
      changed();
      box.scrollIntoView({ block: "nearest" });
      body.querySelector("textarea").focus();
    },
  };
}
