// Prompt list of report.html, after page.js. Texts of models and prompts are inserted as text nodes
// only.

const PAGE = 20;
const $ = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en-US");

const WORDS = { lost: "Lost", won: "Won", wrong: "Both wrong", right: "Both right" };
const SHOW = {
  differ: (entry) => entry.outcome === "lost" || entry.outcome === "won",
  all: () => true,
  ...Object.fromEntries(Object.keys(WORDS).map((each) => [each, (entry) => entry.outcome === each])),
};
const THINK = {
  any: () => true,
  longer: ({ dense, pruned }) => pruned.tokens > dense.tokens,
  much: ({ dense, pruned }) => pruned.tokens >= 1.5 * dense.tokens && pruned.tokens > dense.tokens,
  shorter: ({ dense, pruned }) => pruned.tokens < dense.tokens,
  open: ({ dense, pruned }) => dense.state === "open" || pruned.state === "open",
  loop: ({ dense, pruned }) => dense.loop > 0 || pruned.loop > 0,
};
const longer = ({ dense, pruned }) => (pruned.tokens + 1) / (dense.tokens + 1);

function text(entry) {
  entry.text ??= [entry.question, entry.gold, entry.task, ...["dense", "pruned"].flatMap(
    (arm) => [entry[arm].found, entry[arm].answer, entry[arm].thinking])].join("\n").toLowerCase();
  return entry.text;
}

function matches(entry, words) {
  const wanted = /^#(\d+)$/.exec(words);
  return wanted ? entry.prompt === Number(wanted[1]) : text(entry).includes(words);
}

function side(entry, arm) {
  const answer = entry[arm];
  const name = document.getElementById("found").dataset[arm];
  const verdict = element("span", { class: answer.right ? "right" : "wrong" },
    answer.right ? "right" : "wrong");
  const figures = `${number(answer.tokens)} thinking tokens, ${answer.state} · `
    + `${number(answer.answered)} answer tokens, ended by ${answer.end} · `
    + `scored answer: ${answer.found ?? "none found"}`;
  const box = element("section", { class: `side ${arm}`, "aria-label": `${name} model` },
    element("p", { class: "arm" }, `${name}: `, verdict), element("p", { class: "quiet" }, figures));
  if (answer.thinking === undefined) {
    box.append(element("p", { class: "quiet" }, "The thinking is in records.jsonl."));
    return box;
  }

  const thinking = element("pre", { tabindex: 0, "aria-label": `thinking of the ${name} model` });
  const shared = answer.thinking.slice(0, entry.shared);
  if (shared) thinking.append(element("span", { class: "shared" }, shared));
  thinking.append(answer.thinking.slice(entry.shared) || (shared ? "" : "no thinking"));
  box.append(thinking, element("pre",
    { class: "answer", tabindex: 0, "aria-label": `answer of the ${name} model` },
    answer.answer.trim() || "no answer"));
  return box;
}

function shortened(words, most) {
  const line = words.replace(/\s+/g, " ").trim();
  return line.length > most ? `${line.slice(0, most - 1)}…` : line;
}

function draw(entry) {
  const { dense, pruned } = entry;
  const summary = element("summary", {},
    element("span", { class: `key ${entry.outcome}` }),
    element("strong", {}, WORDS[entry.outcome]), " ",
    element("span", { class: "tag" }, shortened(entry.task, 40)), " ",
    element("span", { class: "quiet" }, `#${entry.prompt}${entry.sample ? `.${entry.sample}` : ""}`),
    " ", element("span", { class: "asked" }, shortened(entry.question, 160)), " ",
    element("span", { class: "lengths" }, `${number(dense.tokens)} → ${number(pruned.tokens)} tokens`));
  const found = element("details", { class: `found ${entry.outcome}`, "data-prompt": entry.prompt },
    summary);

  const fill = () => {
    if (found.children.length > 1) return;
    found.append(
      element("p", { class: "question" }, entry.question),
      element("p", { class: "quiet" }, `Right answer: ${entry.gold}`),
      element("div", { class: "sides" }, side(entry, "dense"), side(entry, "pruned")));
  };
  found.addEventListener("toggle", fill);
  found.addEventListener("fill", fill);
  return found;
}

function browse(entries) {
  const controls = Object.fromEntries(
    ["search", "show", "task", "think", "order"].map((name) => [name, $(`browse-${name}`)]));
  const list = $("found"), state = $("browse-state"), pager = $("pager");
  let shown = [], first = 0;

  const page = (start, focus = false) => {
    first = Math.max(0, Math.min(start, PAGE * Math.floor(Math.max(shown.length - 1, 0) / PAGE)));
    const here = shown.slice(first, first + PAGE);
    list.replaceChildren(...here.map(draw));

    state.textContent = shown.length
      ? `${number(first + 1)}–${number(first + here.length)} of ${number(shown.length)} prompts`
      : "No prompt matches.";
    pager.hidden = shown.length <= PAGE;
    $("previous").disabled = first === 0;
    $("next").disabled = first + PAGE >= shown.length;
    if (focus) { list.querySelector("summary")?.focus(); list.scrollIntoView({ block: "nearest" }); }
  };

  const choose = () => {
    const words = controls.search.value.trim().toLowerCase();
    const show = SHOW[controls.show.value], think = THINK[controls.think.value];
    const task = controls.task.value;
    shown = entries.filter((entry) => show(entry) && think(entry)
      && (!task || entry.task === task) && (!words || matches(entry, words)));
    if (controls.order.value === "longer") shown.sort((a, b) => longer(b) - longer(a));
    page(0);
  };

  const open = (prompt) => {
    controls.search.value = `#${prompt}`;
    controls.show.value = "all";
    controls.think.value = "any";
    controls.task.value = "";
    choose();
    const found = list.querySelector("details");
    if (found) found.open = true;
    $("prompts").scrollIntoView();
    found?.querySelector("summary").focus({ preventScroll: true });
  };

  let waiting = 0;
  controls.search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(choose, 120);
  });
  for (const name of ["show", "task", "think", "order"]) {
    controls[name].addEventListener("change", choose);
  }
  $("previous").addEventListener("click", () => page(first - PAGE, true));
  $("next").addEventListener("click", () => page(first + PAGE, true));
  $("clear").addEventListener("click", () => { $("filters").reset(); choose(); });
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  for (const dot of document.querySelectorAll(".dot[data-prompt]")) {
    dot.addEventListener("click", () => open(dot.dataset.prompt));
  }

  const step = (by) => {
    const all = [...list.querySelectorAll("summary")];
    const at = all.indexOf(document.activeElement?.closest("details")?.firstElementChild);
    all[Math.max(0, Math.min(at + by, all.length - 1))]?.focus();
  };
  const keys = {
    "/": () => controls.search.focus(),
    j: () => step(1),
    k: () => step(-1),
    n: () => page(first + PAGE, true),
    p: () => page(first - PAGE, true),
  };
  addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });

  const tasks = [...new Set(entries.map((entry) => entry.task))].sort();
  for (const task of tasks) {
    const option = element("option", {}, shortened(task, 40));
    option.value = task;
    controls.task.append(option);
  }
  controls.task.closest("label").hidden = tasks.length < 2;
  controls.show.value = entries.some(SHOW.differ) ? "differ" : "all";
  controls.show.querySelector(`[value="${controls.show.value}"]`).defaultSelected = true;
  for (const part of document.querySelectorAll(".scripted")) part.hidden = false;
  for (const part of document.querySelectorAll(".unscripted")) part.remove();
  choose();
}

const data = $("prompts-data");
if (data) browse(JSON.parse(data.textContent));
