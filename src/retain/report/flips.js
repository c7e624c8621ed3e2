"use strict";
(() => {
  const { items, others, words } = JSON.parse(document.getElementById("flip-data").textContent);
  // Each place once, and never read as a pattern: a name may hold anything.
  const put = (text, values) => text.replace(/\{(\w+)\}/g, (_, place) => values[place]);
  const copy = document.getElementById("copy");
  if (copy && navigator.clipboard) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(document.getElementById("command").textContent);
      copy.textContent = words.copied;
    });
  }
  const list = document.getElementById("list");
  if (!list) return;
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
    li.append(make("span", "chip " + tone, words.outcome[it.outcome]), " ", make("span", "small", it.probe + " · " + it.item));
    li.append(make("p", "prompt", it.prompt));
    const answers = make("dl", "answers");
    const add = (label, text) => {
      const box = make("div");
      box.append(make("dt", "", label), make("dd", "", text || words.empty));
      answers.append(box);
    };
    if (it.reference) add(words.right_answer, it.reference);
    add(words.before, it.before);
    add(words.after, it.after);
    others.forEach((name, k) => it.others[k] && add(put(words.after_other, { name }), it.others[k]));
    li.append(answers);
    return li;
  };
  const draw = () => {
    const wanted = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    const hits = items.filter((it) => (!chosen.outcome || it.outcome === chosen.outcome)
      && (!chosen.probe || it.probe === chosen.probe) && wanted.every((w) => it.text.includes(w)));
    list.replaceChildren(...hits.slice(0, shown).map(card));
    count.textContent = put(hits.length === items.length ? words.count : words.count_of, { n: hits.length, all: items.length });
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
