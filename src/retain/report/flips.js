"use strict";
(() => {
  const copy = document.getElementById("copy");
  if (copy && navigator.clipboard) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(document.getElementById("command").textContent);
      copy.textContent = "Copied";
    });
  }
  const list = document.getElementById("list");
  if (!list) return;
  const { items, others } = JSON.parse(document.getElementById("flip-data").textContent);
  const find = document.getElementById("find"), more = document.getElementById("more"), count = document.getElementById("count");
  const fields = ["probe", "item", "prompt", "reference", "before", "after"];
  for (const it of items) it.text = [...fields.map((f) => it[f]), ...it.others].join("\n").toLowerCase();
  const PAGE = 25;
  const chosen = { outcome: "", probe: "" };
  let shown = PAGE;

  // Text from models goes through textContent only, so that it can never become markup.
  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const card = (it) => {
    const li = make("li", it.outcome);
    const tone = { lost: "bad", worse: "bad", gained: "good", better: "good" }[it.outcome] || "";
    li.append(make("span", "chip " + tone, it.outcome), " ", make("span", "small", it.probe + " · " + it.item));
    li.append(make("p", "prompt", it.prompt));
    const answers = make("dl", "answers");
    const add = (label, text) => {
      const box = make("div");
      box.append(make("dt", "", label), make("dd", "", text || "(empty)"));
      answers.append(box);
    };
    if (it.reference) add("right answer", it.reference);
    add("before", it.before);
    add("after", it.after);
    others.forEach((name, k) => it.others[k] && add("after, " + name, it.others[k]));
    li.append(answers);
    return li;
  };
  const draw = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    const hits = items.filter((it) => (!chosen.outcome || it.outcome === chosen.outcome)
      && (!chosen.probe || it.probe === chosen.probe) && words.every((w) => it.text.includes(w)));
    list.replaceChildren(...hits.slice(0, shown).map(card));
    count.textContent = hits.length === items.length ? items.length + " items" : hits.length + " of " + items.length + " items";
    more.hidden = hits.length <= shown;
  };
  for (const key of ["outcome", "probe"]) {
    const buttons = [...document.querySelectorAll("button[data-" + key + "]")];
    for (const button of buttons) {
      button.addEventListener("click", () => {
        chosen[key] = button.dataset[key];
        for (const other of buttons) other.setAttribute("aria-pressed", String(other === button));
        shown = PAGE;
        draw();
      });
    }
  }
  find.addEventListener("input", () => { shown = PAGE; draw(); });
  more.addEventListener("click", () => { shown += PAGE; draw(); });
  draw();
})();
