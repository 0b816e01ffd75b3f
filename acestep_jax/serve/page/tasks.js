// The tasks, as radio buttons; tasks that the model was not trained for say why.
import { byId, el } from "./dom.js";
import { reasonAgainst } from "./request.js";

const NAMES = { text2music: "New song", "cover-nofsq": "Close cover" };

/** Show the tasks; `choose(name)` is called when another one is selected. */
export function showTasks(options, model, chosen, choose) {
  byId("tasks").replaceChildren(
    ...Object.entries(options.tasks).map(([name, task]) => {
      const reason = reasonAgainst(name, task, model);
      const input = el("input", {
        type: "radio",
        name: "task",
        value: name,
        checked: chosen === name,
        disabled: Boolean(reason),
      });
      input.addEventListener("change", () => choose(name));
      const text = NAMES[name] ?? name.charAt(0).toUpperCase() + name.slice(1);
      return el(
        "label",
        { class: "chip", title: reason ?? undefined, data: { task: name } },
        input,
        text,
        reason ? el("span", { class: "sr-only" }, ` (${reason})`) : null,
      );
    }),
  );
  const out = Object.entries(options.tasks).filter(([name, task]) => reasonAgainst(name, task, model));
  byId("tasks-note").textContent = out.length
    ? `${out.map(([name]) => name).join(", ")}: ${reasonAgainst(...out[0], model)}`
    : "";
}
