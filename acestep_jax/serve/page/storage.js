// Storage in this browser: settings and the draft in localStorage, sound files in IndexedDB.

const PREFIX = "acestep.";
const DATABASE = "acestep";
const FILES = "files";

/** Return the value stored under a name; `fallback` if there is none, or it cannot be read. */
export function read(name, fallback) {
  try {
    const text = localStorage.getItem(PREFIX + name);
    return text === null ? fallback : JSON.parse(text);
  } catch {
    return fallback;
  }
}

/** Store a value; return whether there was room, which a private window may not have. */
export function write(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

const asPromise = (request) =>
  new Promise((resolve, reject) => {
    request.addEventListener("success", () => resolve(request.result));
    request.addEventListener("error", () => reject(request.error));
  });

async function files(mode) {
  const request = indexedDB.open(DATABASE, 1);
  request.addEventListener("upgradeneeded", () => request.result.createObjectStore(FILES));
  const database = await asPromise(request);
  return { store: database.transaction(FILES, mode).objectStore(FILES), close: () => database.close() };
}

/** Store a file under a name; null removes it. A browser without storage only loses it on reload. */
export async function keepFile(name, blob) {
  try {
    const { store, close } = await files("readwrite");
    await asPromise(blob ? store.put(blob, name) : store.delete(name));
    close();
    return true;
  } catch {
    return false;
  }
}

/** Return a stored file; null if there is none. */
export async function keptFile(name) {
  try {
    const { store, close } = await files("readonly");
    const found = await asPromise(store.get(name));
    close();
    return found ?? null;
  } catch {
    return null;
  }
}
