// The controls of a request, built from the server's list of options: a new argument there is a new control here.
import { byId, el } from "./dom.js";
import { ELSEWHERE, isNumeric, isShown, readValue } from "./request.js";

// The options that musicians set most; the others are under "More". Labels, ranges and help come from the server.
const FRONT = [
  "audio_duration",
  "bpm",
  "keyscale",
  "timesignature",
  "vocal_language",
  "track_name",
  "audio_cover_strength",
  "seed",
];
// Fields that are part of the page itself, because they are larger than a control.
const LARGE = ["prompt", "lyrics"];
const SHORT = 12; // characters that fit in a small control
const GROUPS = { request: "More about the song", planning: "Planner", sampling: "How it is computed" };

/** Return the default of a field, in words. */
function meaning(field) {
  if (field.meaning !== null) return field.meaning;
  return field.default === null || Array.isArray(field.default) ? "" : String(field.default);
}

/** Return the default of a field for a small control; if it is too long, only that it is automatic (see the title). */
function shortly(field) {
  const words = meaning(field);
  return words.length > SHORT ? "auto" : words;
}

/**
 * Return the form: {show, setError, clearErrors}.
 *
 * It edits `state.values`; `planner()` returns whether there is a planner; `changed(name)` is called after each change.
 */
export function createForm(state, options, planner, changed) {
  const controls = new Map(); // name -> {box, set}
  const elsewhere = [...FRONT, ...LARGE, ...ELSEWHERE];
  const front = byId("front-fields");
  const more = byId("more-fields");

  for (const name of FRONT) if (options.fields[name]) front.append(make(name));
  for (const [group, title] of Object.entries(GROUPS)) {
    const names = Object.keys(options.fields).filter(
      (name) => options.fields[name].group === group && !elsewhere.includes(name),
    );
    if (!names.length) continue;
    more.append(
      el(
        "fieldset",
        { class: "group", data: { group } },
        el("legend", {}, title),
        el("div", { class: "fields" }, names.map(make)),
      ),
    );
  }
  for (const name of LARGE) {
    const input = byId(name);
    input.addEventListener("input", () => store(name, input.value === "" ? undefined : input.value));
    const set = () => {
      if (input.value !== (state.values[name] ?? "")) input.value = state.values[name] ?? "";
    };
    controls.set(name, { box: input.closest("[data-field]"), input, set });
  }

  function store(name, value) {
    if (value === undefined) delete state.values[name];
    else state.values[name] = value;
    clearError(name);
    changed(name);
  }

  /** Return the box of a field: its label, its control, its help and its error message. */
  function make(name) {
    const field = options.fields[name];
    const id = `field-${name}`;
    const made = control(name, field, id);
    const unit = field.unit ? ` (${field.unit === "beats per minute" ? "beats/min" : field.unit})` : "";
    const box = el(
      "div",
      { class: `field${field.long ? " wide" : ""}`, data: { field: name } },
      made.label === false ? null : el("label", { htmlFor: id, title: field.help }, `${field.label}${unit}`),
      made.box,
      el("p", { class: "error", id: `error-${name}`, hidden: true }),
    );
    made.input.setAttribute("aria-describedby", `error-${name} help-${name}`);
    // In the page for screen readers, and as the label's tooltip for others.
    box.append(el("p", { id: `help-${name}`, class: "help" }, field.help));
    controls.set(name, { box, input: made.input, set: made.set });
    return box;
  }

  function control(name, field, id) {
    if (name === "track_name") return tracks(name, field, id);
    if (field.values.length || (field.types.includes("boolean") && field.default === null))
      return choice(name, field, id);
    if (field.types.includes("boolean")) return check(name, field, id);
    if (name === "seed") return seed(name, field, id);
    if (isNumeric(field) && !field.many && field.minimum === 0 && field.maximum === 1) return slider(name, field, id);
    return text(name, field, id);
  }

  function text(name, field, id) {
    const isNumber = isNumeric(field) && !field.many;
    const input = field.long
      ? el("textarea", { id, rows: 3 })
      : el("input", {
          id,
          type: "text",
          autocomplete: "off",
          inputMode: isNumber ? (field.types.includes("whole") ? "numeric" : "decimal") : "text",
        });
    input.placeholder = field.long ? meaning(field) : shortly(field);
    if (!field.long) input.title = meaning(field);
    input.addEventListener("input", () => store(name, readValue(field, input.value)));
    const written = () => [].concat(state.values[name] ?? []).join(", ");
    const set = () => {
      if (JSON.stringify(readValue(field, input.value)) !== JSON.stringify(state.values[name])) input.value = written();
    };
    return { box: input, input, set };
  }

  function choice(name, field, id) {
    const values = field.values.length ? field.values : ["true", "false"];
    const words = { true: "yes", false: "no" };
    const open = meaning(field);
    const input = el(
      "select",
      { id, title: open },
      el("option", { value: "" }, shortly(field) || "default"),
      values.map((value) => el("option", { value }, field.names?.[value] ?? words[value] ?? value)),
    );
    input.addEventListener("change", () => store(name, readValue(field, input.value)));
    const set = () => {
      const value = state.values[name] === undefined ? "" : String(state.values[name]);
      // Other spellings, such as "4/4" or "en-US", are valid too: show imported values instead of losing them.
      if (![...input.options].some((option) => option.value === value)) input.append(el("option", { value }, value));
      input.value = value;
    };
    return { box: input, input, set };
  }

  function check(name, field, id) {
    const input = el("input", { id, type: "checkbox" });
    input.addEventListener("change", () => store(name, input.checked === field.default ? undefined : input.checked));
    const box = el("label", { class: "check", title: field.help }, input, ` ${field.label}`);
    return { box, input, label: false, set: () => (input.checked = state.values[name] ?? field.default) };
  }

  function slider(name, field, id) {
    const input = el("input", {
      id,
      type: "number",
      min: 0,
      max: 1,
      step: "any",
      inputMode: "decimal",
      placeholder: shortly(field),
      title: meaning(field),
    });
    const range = el("input", { type: "range", min: 0, max: 1, step: 0.05, tabIndex: -1, aria: { hidden: "true" } });
    input.addEventListener("input", () => {
      store(name, readValue(field, input.value));
      show();
    });
    range.addEventListener("input", () => {
      input.value = range.value;
      store(name, Number(range.value));
    });
    const show = () => (range.value = state.values[name] ?? field.default ?? 0);
    const set = () => {
      if (Number(input.value) !== state.values[name] || input.value === "") input.value = state.values[name] ?? "";
      show();
    };
    return { box: el("div", { class: "pair" }, range, input), input, set };
  }

  function seed(name, field, id) {
    const made = text(name, field, id);
    made.input.placeholder = "any";
    const roll = el(
      "button",
      { type: "button", class: "quiet", aria: { label: "Clear the seed: a new one each time" } },
      "New",
    );
    roll.addEventListener("click", () => {
      made.input.value = "";
      store(name, undefined);
    });
    return { ...made, box: el("div", { class: "pair" }, made.input, roll) };
  }

  function tracks(name, field, id) {
    const boxes = field.values.map((track) => {
      const input = el("input", { type: "checkbox", value: track });
      input.addEventListener("change", () => {
        const most = options.tasks[state.task].max_tracks;
        if (most === 1) for (const [other] of boxes) if (other !== input) other.checked = false;
        const chosen = boxes
          .map(([other]) => other)
          .filter((other) => other.checked)
          .map((other) => other.value);
        store(name, chosen.length ? (most === 1 ? chosen[0] : chosen) : undefined);
      });
      return [input, el("label", { class: "chip" }, input, track.replace("_", " "))];
    });
    const group = el(
      "div",
      { id, class: "chips", role: "group", tabIndex: -1, aria: { label: field.label } },
      boxes.map(([, label]) => label),
    );
    const set = () => {
      const chosen = [].concat(state.values[name] ?? []);
      for (const [input] of boxes) input.checked = chosen.includes(input.value);
    };
    return { box: group, input: group, label: false, set };
  }

  /** Show the controls for the task with the values of the state. */
  function show() {
    for (const [name, { box, set }] of controls) {
      if (!LARGE.includes(name)) box.hidden = !isShown(name, options.fields[name], state.task, planner());
      set();
    }
    for (const group of more.querySelectorAll("fieldset"))
      group.hidden = ![...group.querySelectorAll(".field")].some((box) => !box.hidden);
  }

  const boxOf = (name) => controls.get(name)?.box ?? document.querySelector(`[data-field~="${CSS.escape(name)}"]`);

  /** Show an error at the field that it names, and scroll there; return whether the field is on the page. */
  function setError(name, message) {
    const box = boxOf(name);
    const place = box?.querySelector(".error");
    if (!place || box.closest("[hidden]")) return false;
    place.textContent = message;
    place.hidden = false;
    for (let folder = box.closest("details"); folder; folder = folder.parentElement.closest("details"))
      folder.open = true;
    const input = controls.get(name)?.input ?? box.querySelector("input, textarea, select, button");
    input?.setAttribute("aria-invalid", "true");
    input?.focus();
    box.scrollIntoView({ block: "nearest" });
    return true;
  }

  function clearError(name) {
    const box = boxOf(name);
    const place = box?.querySelector(".error");
    if (!place || place.hidden) return;
    place.hidden = true;
    place.textContent = "";
    for (const input of box.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
  }

  function clearErrors() {
    for (const place of document.querySelectorAll("#compose .error:not([hidden])"))
      clearError(place.closest("[data-field]").dataset.field.split(" ")[0]);
  }

  return { show, setError, clearError, clearErrors };
}
