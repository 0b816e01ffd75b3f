// The page: connects the form, the source, the history and the player. See docs/serve.md.
import { showAdapters } from "./adapters.js";
import * as api from "./api.js";
import { announce, byId, el, saveText, settle, toast } from "./dom.js";
import { createEditor } from "./editor.js";
import { createForm } from "./form.js";
import { createHistory } from "./history.js";
import { createPlan } from "./plan.js";
import * as player from "./player.js";
import { fromFields } from "./regions.js";
import { EMPTY, fromRequest, takesSource, toRequest, usesPlan } from "./request.js";
import { connectDrops, connectHelp, connectKey, connectTheme, reachable } from "./shell.js";
import * as storage from "./storage.js";
import { showTasks } from "./tasks.js";
import { connectTags, createCounter } from "./texts.js";

const FILES = { source: "src_audio", reference: "reference_audio" };

const state = { ...structuredClone(EMPTY), ...storage.read("draft", {}) };
let options = null;
let about = null; // the server's description of itself
let form = null;
let editor = null;
let planPanel = null;
let songs = null;
let countTokens = null;

const modelOf = (name) => about.models.find((model) => model.name === name) ?? about.models[0];
const planner = () => Boolean(modelOf(state.model).planner);

const save = settle(() => {
  // Files are stored separately, see `setSound`.
  const plain = (sound) => (sound?.kind === "file" ? { kind: "file", name: sound.name, title: sound.title } : sound);
  storage.write("draft", { ...state, source: plain(state.source), reference: plain(state.reference) });
}, 150);

function changed(name) {
  save();
  if (["prompt", "lyrics", "vocal_language"].includes(name)) countTokens();
  if (name === "flow_edit_morph") showTask();
}

// Tasks and models

function showChoices() {
  showTasks(options, modelOf(state.model), state.task, setTask);
}

function setTask(name) {
  state.task = name;
  showTask();
  save();
}

function showTask() {
  for (const input of byId("tasks").querySelectorAll("input")) input.checked = input.value === state.task;
  byId("source").hidden = !takesSource(state, options);
  editor.update(options.tasks[state.task].regions);
  form.show();
  planPanel?.show();
}

function showModels() {
  const select = byId("model");
  select.replaceChildren(...about.models.map(({ name }) => el("option", { value: name }, name)));
  select.value = modelOf(state.model).name;
  state.model = select.value === about.models[0].name ? null : select.value;
  const timed = modelOf(state.model).lrc;
  byId("lrc-field").hidden = !timed;
  if (!timed) state.lrc = byId("lrc").checked = false;
}

function showScales() {
  showAdapters(state, about.adapters, () => {
    form.clearError("adapters");
    save();
  });
}

// Sounds that a song is made from

/** Set the source or the reference: {kind: "song", id, index}, {kind: "file", blob, name}, or null. */
async function setSound(name, sound, regions = null) {
  state[name] = sound;
  if (name === "source") state.regions = regions ?? [];
  form.clearError(FILES[name]);
  if (name === "source") await Promise.all([keep(name, sound), editor.load(sound)]);
  else {
    showReference();
    await keep(name, sound);
  }
  save();
}

const keep = (name, sound) => storage.keepFile(name, sound?.kind === "file" ? sound.blob : null);

function showReference() {
  byId("reference-given").hidden = !state.reference;
  byId("reference-none").hidden = Boolean(state.reference);
  byId("reference-title").textContent = state.reference?.title ?? "";
}

function useFile(name, file) {
  setSound(name, { kind: "file", blob: file, name: file.name, title: file.name });
}

/** Restore the files that the draft had before a reload. */
async function restoreSounds() {
  for (const name of Object.keys(FILES)) {
    const sound = state[name];
    if (sound?.kind !== "file") continue;
    const blob = await storage.keptFile(name);
    state[name] = blob ? { ...sound, blob } : null;
  }
  showReference();
  await editor.load(state.source);
}

/** Use a finished song as the source of a task, or as the reference (task null). */
async function send(song, task) {
  if (task === null) {
    await setSound("reference", song);
    toast("It is now the reference for the next song.");
    byId("reference-clear").focus();
    return;
  }
  setTask(task);
  await setSound("source", song);
  byId("compose").scrollIntoView({ block: "start" });
  toast(
    options.tasks[task].regions
      ? "Drag over the waveform to choose what changes."
      : "It is now the source of the next song.",
  );
  (options.tasks[task].regions ? byId("add-region") : byId("prompt")).focus();
}

// Requests

async function generate() {
  form.clearErrors();
  showProblem("");
  const button = byId("generate");
  if (button.getAttribute("aria-disabled") === "true") return;
  if (!(state.values.prompt ?? "").trim() && !usesPlan(state, planner()))
    return void form.setError("prompt", "Describe the music in a few words.");
  const { body, files } = toRequest(state, options, planner());
  const needs = takesSource(state, options) && options.tasks[state.task].needs_source && !body.audio_codes;
  if (needs && !body.src_audio && !files.src_audio)
    return void refuse(
      new api.Refused(400, "src_audio: choose a source: drop a file, or send a song here", "src_audio"),
    );
  button.setAttribute("aria-disabled", "true");
  button.textContent = Object.keys(files).length ? "Uploading…" : "Requesting…";
  try {
    songs.add(await api.submit(body, files));
    announce("Requested");
  } catch (error) {
    refuse(error);
  } finally {
    button.removeAttribute("aria-disabled");
    button.textContent = "Generate";
  }
}

/** Show an error at the field that it names, or above the button. */
function refuse(error) {
  const text = error.message.replace(/^[\w, ]+: /, (start) =>
    error.field && start.startsWith(error.field) ? "" : start,
  );
  if (error.field && form.setError(error.field, text)) return announce(`${error.field}: ${text}`);
  const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  showProblem(`${error.message}.${wait}`.replace(/\.\./, "."));
}

function showProblem(text) {
  byId("problem").textContent = text;
  byId("problem").hidden = !text;
}

/** Show a request, from a record or a file, in the form. */
async function adopt(body, { sounds = {}, seed = true } = {}) {
  const { state: next, unknown } = fromRequest(body, options, 600);
  if (!seed) for (const name of ["seed", "retake_seed"]) delete next.values[name];
  if (next.model && !about.models.some((model) => model.name === next.model)) {
    unknown.push(`model ${next.model}`);
    next.model = null;
  }
  for (const name of Object.keys(next.adapters)) {
    if (about.adapters.includes(name)) continue;
    unknown.push(`adapter ${name}`);
    delete next.adapters[name];
  }
  Object.assign(state, next, sounds);
  byId("variations").value = state.variations;
  byId("format").value = state.format;
  byId("lrc").checked = state.lrc;
  showModels();
  showChoices();
  showScales();
  showReference();
  await editor.load(state.source);
  state.regions = fromFields(body, state.source?.seconds ?? 600);
  await Promise.all(Object.keys(FILES).map((name) => keep(name, state[name])));
  form.clearErrors();
  showTask();
  countTokens();
  save();
  return unknown;
}

async function useRecord(record, seed) {
  const body = {
    ...record.request,
    model: record.model,
    adapters: record.adapters,
    variations: record.songs.length,
    format: record.format,
    lrc: record.lrc,
  };
  const sounds = {};
  try {
    for (const [name, field] of Object.entries(FILES)) {
      if (!record.uploads?.includes(field)) continue;
      const title = `${name === "source" ? "Source" : "Reference"} of “${String(record.request.prompt).slice(0, 40)}”`;
      sounds[name] = { kind: "file", blob: await api.blob(api.uploadPath(record.id, field)), name: field, title };
    }
  } catch (error) {
    return toast(`Its audio could not be read: ${error.message}`);
  }
  await adopt(body, { sounds, seed });
  byId("compose").scrollIntoView({ block: "start" });
  byId("prompt").focus({ preventScroll: true });
  announce("The settings are in the form");
}

/** Show the plan of a song in the form, to edit it and make another song from it. */
async function usePlan(record, song) {
  await useRecord(record, false);
  try {
    planPanel?.use(JSON.parse(await api.text(song.plan_file)));
  } catch (error) {
    toast(`Its plan could not be read: ${error.message}`);
  }
}

async function importFile(file) {
  try {
    const unknown = await adopt(JSON.parse(await file.text()));
    toast(unknown.length ? `Imported, except for unknown fields: ${unknown.join(", ")}` : "Imported.");
  } catch (error) {
    toast(`${file.name} is not a request: ${error.message}`);
  }
}

function exportForm() {
  const { body, files } = toRequest(state, options, planner());
  saveText("request.json", JSON.stringify(body, null, 2));
  if (Object.keys(files).length) toast("Saved. Sound files are not included: choose them again after an import.");
}

// The page around it

function connectForm() {
  connectTags();
  connectHelp();
  byId("compose").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      generate();
    }
  });
  const variations = byId("variations");
  variations.max = about.limits.variations;
  variations.value = state.variations;
  variations.addEventListener("input", () => {
    state.variations = Number.isInteger(variations.valueAsNumber) ? variations.valueAsNumber : 1;
    form.clearError("variations");
    save();
  });
  const format = byId("format");
  format.replaceChildren(...options.formats.map((name) => el("option", { value: name }, name)));
  format.value = state.format;
  format.addEventListener("change", () => ((state.format = format.value), save()));
  const timed = byId("lrc");
  timed.checked = state.lrc;
  timed.addEventListener("change", () => ((state.lrc = timed.checked), form.clearError("lrc"), save()));
  byId("model").addEventListener("change", (event) => {
    state.model = event.target.value;
    showModels();
    showChoices();
    showTask();
    countTokens();
    save();
  });
  for (const [name, field] of Object.entries(FILES)) {
    byId(`${name}-file`).addEventListener("change", (event) => {
      if (event.target.files[0]) useFile(name, event.target.files[0]);
      event.target.value = "";
    });
    byId(`${name}-clear`).addEventListener("click", () => {
      setSound(name, null);
      byId(`${name}-file`).focus();
    });
    byId(`${name}-file`).title = options.files[field];
  }
  byId("export").addEventListener("click", exportForm);
  byId("import").addEventListener("change", (event) => {
    if (event.target.files[0]) importFile(event.target.files[0]);
    event.target.value = "";
  });
  byId("clear").addEventListener("click", () => {
    const before = structuredClone({ ...state, source: null, reference: null });
    const kept = { source: state.source, reference: state.reference };
    adopt({}).then(() => byId("prompt").focus());
    toast("The form is cleared.", { label: "Undo", act: () => restore({ ...before, ...kept }) });
  });
}

async function restore(earlier) {
  Object.assign(state, earlier);
  const { body } = toRequest({ ...state, source: null, reference: null }, options, planner());
  await adopt(
    { ...body, ...Object.fromEntries(Object.entries(state.values)) },
    { sounds: { source: earlier.source, reference: earlier.reference } },
  );
  state.regions = earlier.regions;
  showTask();
}

/** Use a dropped file: as a request, as a reference if it was dropped there, else as a source. */
function take(file, target) {
  if (file.name.endsWith(".json") || file.type === "application/json") return void importFile(file);
  if (target.closest("#reference")) return useFile("reference", file);
  if (!takesSource(state, options)) setTask("repaint");
  useFile("source", file);
}

async function open() {
  [options, about] = await Promise.all([api.options(), api.server()]);
  form = createForm(state, options, planner, changed);
  editor = createEditor(state, save);
  const request = (withPlan) => toRequest(withPlan ? state : { ...state, plan: null }, options, true).body;
  if (about.planner) planPanel = createPlan(state, options, planner, request, save, refuse);
  if (!options.tasks[state.task]) state.task = EMPTY.task;
  showModels();
  showChoices();
  showScales();
  connectForm();
  connectDrops(take);
  countTokens = createCounter(state, options);
  showTask();
  countTokens();
  songs = createHistory(options, { use: useRecord, usePlan, send, modelOf }, reachable);
  await Promise.all([restoreSounds(), songs.start()]);
  document.body.dataset.state = "ready";
}

async function openAgainAndAgain() {
  connectTheme(() => {
    editor?.redraw();
    songs?.redraw();
  });
  connectKey();
  player.connect();
  for (;;) {
    try {
      await open();
      return;
    } catch (error) {
      if (!(error instanceof api.Unreachable)) {
        showProblem(`The page could not start: ${error.message}`);
        throw error;
      }
      reachable(false);
      await new Promise((resolve) => setTimeout(resolve, 3000));
    }
  }
}

openAgainAndAgain();
