// From what the form holds to a request, and back. No DOM here.
//
// The form's state is {task, values, regions, adapters, source, reference, model, variations, format, lrc, plan}. `values` has
// a field of the server's list for each that was set; what is not there is left to the server.
import { fromFields, toFields } from "./regions.js";

const REGIONS = ["repainting_start", "repainting_end"];
const OWN = ["model", "adapters", "variations", "format", "lrc", "plan"];
/** Fields that the form has in another shape than a control of their own. */
export const ELSEWHERE = ["task_type", "src_audio", "reference_audio", ...REGIONS];
// What a plan says takes the place of these, as `prompt` its caption.
const PLANNED = [
  "prompt",
  "lyrics",
  "audio_duration",
  "vocal_language",
  "bpm",
  "keyscale",
  "timesignature",
  "audio_codes",
];
// What a song's own description has beyond its request.
const DESCRIPTIVE = ["seconds"];

export const EMPTY = {
  task: "text2music",
  values: {},
  regions: [],
  adapters: {},
  source: null,
  reference: null,
  model: null,
  variations: 1,
  format: "flac",
  lrc: false,
  plan: null,
};

/** Return whether a field is shown for a task: none that the task does not take, and none that the form has elsewhere. */
export function isShown(name, field, task, planner) {
  if (field.hidden || ELSEWHERE.includes(name)) return false;
  if (field.group === "planning" && !planner) return false;
  return field.tasks.includes(task);
}

/** Return why a model cannot do a task; null if it can. */
export function reasonAgainst(name, task, model) {
  if (!model || model.tasks.includes(name)) return null;
  if (model.turbo && !task.turbo) return "needs a base model: turbo models were not trained for it";
  if (task.tokenized) return "needs a model with an audio tokenizer";
  return "this model was not trained for it";
}

/** Return whether a task takes a source, in this state: editing by flow needs one for every task. */
export function takesSource(state, options) {
  const task = options.tasks[state.task];
  return task.accepts.includes("src_audio") || Boolean(state.values.flow_edit_morph);
}

/**
 * Return the body of a request, and the files that go with it.
 *
 * A source is {kind: "song", id, index} of this server, which is named by its link, or {kind: "file", blob}, which is
 * uploaded. Fields that the task does not take stay in the form, but are not sent.
 */
export function toRequest(state, options, planner = false) {
  const task = options.tasks[state.task];
  const body = {};
  const files = {};
  for (const [name, value] of Object.entries(state.values)) {
    const field = options.fields[name];
    if (!field || value === undefined || value === null || !field.tasks.includes(state.task)) continue;
    if (field.group === "planning" && !planner) continue;
    body[name] = value;
  }
  body.prompt = state.values.prompt ?? "";
  if (state.task !== "text2music") body.task_type = state.task;
  if (task.regions && state.source) Object.assign(body, toFields(state.regions));
  const sources = { src_audio: takesSource(state, options) ? state.source : null, reference_audio: state.reference };
  for (const [name, sound] of Object.entries(sources)) {
    if (!sound) continue;
    if (sound.kind === "song") body[name] = songLink(sound);
    else files[name] = sound;
  }
  const adapters = Object.entries(state.adapters).filter(([, scale]) => Number.isFinite(scale));
  if (adapters.length) body.adapters = Object.fromEntries(adapters);
  if (state.model) body.model = state.model;
  if (state.variations > 1) body.variations = state.variations;
  if (state.format !== "flac") body.format = state.format;
  if (state.lrc) body.lrc = true;
  if (usesPlan(state, planner)) {
    for (const name of PLANNED) delete body[name];
    body.plan = state.plan;
  }
  return { body, files };
}

/** Return whether the song is made of the plan, and not of the prompt and what is beside it. */
export const usesPlan = (state, planner) => Boolean(planner && state.plan && state.task === "text2music");

export const songLink = (sound) => `/v1/songs/${sound.id}/${sound.index}.flac`;

/** Return the song that a link names, {kind, id, index}; null for any other text. */
export function songOf(link) {
  const found = /\/v1\/songs\/([0-9a-f-]{36})\/(\d+)(?:\.\w+)?(?:\?.*)?$/.exec(String(link ?? ""));
  return found ? { kind: "song", id: found[1], index: Number(found[2]) } : null;
}

/**
 * Return the state that a request means, and the names that are not known here.
 *
 * It takes the body of a request, a line of JSONL, and what the server says of a song.
 */
export function fromRequest(body, options, duration = Infinity) {
  if (typeof body !== "object" || body === null || Array.isArray(body)) {
    throw new TypeError("expected a JSON object with a prompt");
  }
  const state = { ...structuredClone(EMPTY), values: {} };
  const unknown = [];
  for (const [name, value] of Object.entries(body)) {
    if (value === null || DESCRIPTIVE.includes(name)) continue;
    if (OWN.includes(name)) state[name] = value;
    else if (name === "src_audio" || name === "reference_audio") {
      const song = songOf(value);
      if (song) state[name === "src_audio" ? "source" : "reference"] = song;
      else unknown.push(name);
    } else if (name === "task_type" && options.tasks[value]) state.task = value;
    else if (REGIONS.includes(name)) continue;
    else if (options.fields[name]) state.values[name] = value;
    else unknown.push(name);
  }
  state.regions = fromFields(body, duration);
  return { state, unknown };
}

/** Return a value of a control as the server takes it: a number, a list, true or false, or text; undefined if empty. */
export function readValue(field, text) {
  const trimmed = text.trim();
  if (trimmed === "") return undefined;
  if (field.types.includes("boolean")) return trimmed === "true";
  const isNumber = isNumeric(field);
  if (field.many) {
    const items = trimmed
      .split(/[,;\n]+/)
      .map((item) => item.trim())
      .filter(Boolean);
    return isNumber ? items.map(numberOf) : items;
  }
  if (isNumber) return numberOf(trimmed);
  return field.long ? text : trimmed;
}

/** Return whether a field is a number, also where a text is accepted for it, as in "128 bpm". */
export function isNumeric(field) {
  return field.types.some((type) => type === "whole" || type === "number") && !(field.values.length > 0);
}

// What is no number is sent as it is: the server says what it expects, in one voice with all other errors.
function numberOf(text) {
  const value = Number(text.replace(/^([+-]?\d+),(\d+)$/, "$1.$2"));
  return Number.isFinite(value) ? value : text;
}

/** Return the difference between two requests, the names of fields that are not equal. */
export function differing(one, other) {
  const names = new Set([...Object.keys(one), ...Object.keys(other)]);
  return [...names].filter((name) => JSON.stringify(one[name]) !== JSON.stringify(other[name])).sort();
}
