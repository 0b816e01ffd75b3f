// Converts the form's state to a request, and back. No DOM here.
//
// The form's state is {task, values, regions, adapters, source, reference, model, variations, format, lrc, plan}. `values` has
// the fields of the server's list that were set; the server chooses the others.
import { fromFields, toFields } from "./regions.js";

const REGIONS = ["repainting_start", "repainting_end"];
// Fields with a song, and what of the form's state it is; of latents, the form takes the sound.
const SOUNDS = {
  src_audio: "source",
  reference_audio: "reference",
  src_latents: "source",
  reference_latents: "reference",
};
const OWN = ["model", "adapters", "variations", "format", "lrc", "plan"];
/** Fields that have no control of their own in the form. */
export const ELSEWHERE = ["task_type", ...Object.keys(SOUNDS), ...REGIONS];
// Fields that a plan replaces; its caption replaces `prompt`.
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
// Fields of a song's JSON that are not part of its request.
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

/** Return whether a field is shown for a task: the task takes it, and it is not elsewhere in the form. */
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

/** Return whether a task takes a source in this state: FlowEdit needs one for every task. */
export function takesSource(state, options) {
  const task = options.tasks[state.task];
  return task.accepts.includes("src_audio") || Boolean(state.values.flow_edit_morph);
}

/**
 * Return the body of a request, and its files.
 *
 * A source is a song of this server, {kind: "song", id, index}, sent as a link, or {kind: "file", blob}, which is
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

/** Return whether the song is made from the plan instead of the prompt and its related fields. */
export const usesPlan = (state, planner) => Boolean(planner && state.plan && state.task === "text2music");

export const songLink = (sound) => `/v1/songs/${sound.id}/${sound.index}.flac`;

/** Return the song that a link refers to, {kind, id, index}; null for any other text. */
export function songOf(link) {
  const found = /\/v1\/songs\/([0-9a-f-]{36})\/(\d+)(?:\.\w+)?(?:\?.*)?$/.exec(String(link ?? ""));
  return found ? { kind: "song", id: found[1], index: Number(found[2]) } : null;
}

/**
 * Return the form's state for a request, and the unknown names in it.
 *
 * It accepts the body of a request, a line of JSONL, and the server's JSON of a song.
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
    else if (Object.hasOwn(SOUNDS, name)) {
      const song = songOf(value);
      if (song) state[SOUNDS[name]] = song;
      else unknown.push(name);
    } else if (name === "task_type" && options.tasks[value]) state.task = value;
    else if (REGIONS.includes(name)) continue;
    else if (options.fields[name]) state.values[name] = value;
    else unknown.push(name);
  }
  state.regions = fromFields(body, duration);
  return { state, unknown };
}

/** Convert a control's value for the server: a number, a list, true or false, or text; undefined if empty. */
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

/** Return whether a field is a number, even if text such as "128 bpm" is accepted too. */
export function isNumeric(field) {
  return field.types.some((type) => type === "whole" || type === "number") && !(field.values.length > 0);
}

// Invalid numbers are sent unchanged, so that the server reports them like all other errors.
function numberOf(text) {
  const value = Number(text.replace(/^([+-]?\d+),(\d+)$/, "$1.$2"));
  return Number.isFinite(value) ? value : text;
}

/** Return the names of the fields that differ between two requests. */
export function differing(one, other) {
  const names = new Set([...Object.keys(one), ...Object.keys(other)]);
  return [...names].filter((name) => JSON.stringify(one[name]) !== JSON.stringify(other[name])).sort();
}
