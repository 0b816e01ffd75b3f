// Everything around the form and the songs: colours, the key, dropped files, whether the server responds.
import * as api from "./api.js";
import { announce, byId } from "./dom.js";
import * as storage from "./storage.js";

const THEMES = ["system", "light", "dark"];

/** Let the button cycle through the themes; `redraw` redraws the canvases. */
export function connectTheme(redraw) {
  const button = byId("theme");
  const show = (theme) => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = theme.charAt(0).toUpperCase() + theme.slice(1);
    button.setAttribute("aria-label", `Colours: ${theme}`);
    redraw();
  };
  button.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(storage.read("theme", "system")) + 1) % THEMES.length];
    storage.write("theme", next);
    show(next);
    announce(`Colours: ${next}`);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show(storage.read("theme", "system")));
  show(storage.read("theme", "system"));
}

/** Ask for the key in a dialog; resolve to null if it is closed. */
function askForKey(problem) {
  const dialog = byId("key-dialog");
  const input = byId("key");
  byId("key-problem").textContent = problem ?? "";
  byId("key-problem").hidden = !problem;
  input.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok" ? input.value.trim() : null), {
      once: true,
    });
  });
}

/** Ask for the key whenever the server requires it. */
export function connectKey() {
  api.onKeyNeeded(askForKey);
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    byId("key-dialog").close("ok");
  });
}

/** Accept files that are dropped anywhere: `dropped(file, target)`. */
export function connectDrops(dropped) {
  const veil = byId("drop");
  let inside = 0;
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  document.addEventListener("dragenter", (event) => hasFiles(event) && (inside++, (veil.hidden = false)));
  document.addEventListener("dragleave", (event) => hasFiles(event) && --inside <= 0 && (veil.hidden = true));
  document.addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    inside = 0;
    veil.hidden = true;
    const file = event.dataTransfer.files[0];
    if (!file) return;
    dropped(file, event.target);
  });
}

/** Show whether the server responds. */
export function reachable(yes) {
  byId("offline").hidden = yes;
  document.body.dataset.server = yes ? "up" : "down";
}

/** Let the checkbox show and hide the help of each option. */
export function connectHelp() {
  const explain = byId("explain");
  const showHelp = () => byId("compose").classList.toggle("explained", explain.checked);
  explain.checked = storage.read("explain", false);
  explain.addEventListener("change", () => (storage.write("explain", explain.checked), showHelp()));
  showHelp();
}
