// The adapters that the server was started with, each with its scale.
import { byId, el } from "./dom.js";

/** Show the adapters with these names; `changed` is called after each change of `state.adapters`. */
export function showAdapters(state, names, changed) {
  const box = byId("adapters");
  box.hidden = !names.length;
  byId("adapter-list").replaceChildren(
    ...names.map((name, i) => {
      const scale = state.adapters[name];
      const used = el("input", { type: "checkbox", id: `adapter-${i}`, checked: scale !== undefined });
      const number = el("input", {
        type: "number",
        step: 0.05,
        value: scale ?? 1,
        disabled: scale === undefined,
        aria: { label: `Scale of ${name}` },
      });
      const range = el("input", {
        type: "range",
        min: 0,
        max: 2,
        step: 0.05,
        value: scale ?? 1,
        disabled: scale === undefined,
        tabIndex: -1,
        aria: { hidden: "true" },
      });
      const store = (value) => {
        if (!used.checked) delete state.adapters[name];
        else if (Number.isFinite(value)) state.adapters[name] = value;
        changed();
      };
      used.addEventListener("change", () => {
        number.disabled = range.disabled = !used.checked;
        store(number.valueAsNumber);
      });
      number.addEventListener("input", () => {
        range.value = number.value;
        store(number.valueAsNumber);
      });
      range.addEventListener("input", () => {
        number.value = range.value;
        store(range.valueAsNumber);
      });
      return el("div", { class: "adapter" }, el("label", { class: "check" }, used, ` ${name}`), range, number);
    }),
  );
}
