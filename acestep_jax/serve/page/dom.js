// DOM helpers. All text is inserted as text: nothing here parses HTML.

/** Return the element with an id; throw if it is missing, which is a bug. */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no element #${id}`);
  return found;
}

/**
 * Return a new element. In `properties`, `class`, `data`, `aria` and `on` set classes, data and ARIA attributes and
 * event listeners; names with a dash, or without a DOM property, set attributes; others set properties. Children are
 * elements, texts or null.
 */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name === "class") element.className = value;
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name === "aria")
      for (const [key, text] of Object.entries(value)) element.setAttribute(`aria-${key}`, text);
    else if (name === "on")
      for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name in element && !name.includes("-")) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const SHAPES = {
  play: "M8 5.5v13l11-6.5z",
  pause: "M7 5h4v14H7zM13 5h4v14h-4z",
  star: "M12 3.6l2.6 5.3 5.8.8-4.2 4.1 1 5.8-5.2-2.7-5.2 2.7 1-5.8-4.2-4.1 5.8-.8z",
  close: "M6.4 5L12 10.6 17.6 5 19 6.4 13.4 12 19 17.6 17.6 19 12 13.4 6.4 19 5 17.6 10.6 12 5 6.4z",
  download: "M11 4h2v8l3-3 1.4 1.4L12 15.8l-5.4-5.4L8 9l3 3zM5 18h14v2H5z",
  spectrum: "M4 20V10h3v10zM9 20V4h3v16zM14 20v-7h3v7zM19 20V8h1.5v12z",
};

/** Return an icon that is hidden from screen readers. */
export function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const path = document.createElementNS(space, "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", "icon");
  path.setAttribute("d", SHAPES[name]);
  svg.append(path);
  return svg;
}

let hush = null;

/** Announce something to screen readers, after any current speech. */
export function announce(text) {
  const live = byId("live");
  live.textContent = "";
  clearTimeout(hush);
  hush = setTimeout(() => (live.textContent = text), 50);
}

/** Show a short message at the bottom of the page, which disappears by itself; `undo` is a button in it. */
export function toast(text, undo = null) {
  const holder = byId("toasts");
  const box = el("div", { class: "toast" }, el("span", {}, text));
  if (undo)
    box.append(
      el("button", { type: "button", class: "quiet", on: { click: () => (box.remove(), undo.act()) } }, undo.label),
    );
  holder.replaceChildren(box);
  announce(text);
  setTimeout(() => box.remove(), undo ? 9000 : 5000);
}

/** Return a function that runs `act` once after the last call, `pause` ms later. */
export function settle(act, pause) {
  let timer = null;
  return (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => act(...values), pause);
  };
}

let probe = null;

/** Return the value of a theme colour, such as "--wave", for a canvas, in the current light or dark theme. */
export function colour(name) {
  if (!probe) document.body.append((probe = el("i", { hidden: true })));
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}

/** Save a text as a file. */
export function saveText(name, text, type = "application/json") {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
