// Views, keys, theme, and the start.
const KEYS = [["j k ← → ↑ ↓", "move through the boxes"], ["Enter", "open"], ["Esc", "close"], ["r", "mark as reviewed"], ["/", "search"], ["1 2 3 4", "boxes, classes, plots, this run"], ["d", "dark or light"], ["?", "these keys"]];

const MEANINGS = {
  unsupported: "a rule objects strongly: look again", weak: "a rule objects a little: look again",
  unknown: "the map did not converge, holds nothing, or its method promises nothing about its sum: look again",
  supported: "no rule objects; it clears nothing", none: "no evidence was asked for"};

function view(name) {
  state.view = name;
  for (const tab of document.querySelectorAll("[role=tab]")) tab.setAttribute("aria-selected", String(tab.dataset.view === name));
  for (const id of ["list", "classes", "plots", "about"]) document.getElementById(id).hidden = id !== name;
  document.getElementById("filters").hidden = document.getElementById("status").hidden = !["list", "plots"].includes(name);
  if (name === "classes") drawClasses();
  if (name === "about") drawAbout();
  refresh();
}
function drawAbout() {
  const counts = counted(B.verdict, X.verdicts.length);
  fill(document.getElementById("about"),
    el("h2", {}, X.name), el("p", {}, `${X.models.join("; ") || "no model"}. ${X.images.path.length} images, ${N} boxes, ${X.failed.length} images failed.`),
    shares(counts, "verdicts of all boxes"),
    el("table", {}, X.verdicts.map((word, k) => counts[k] ? el("tr", {}, el("td", {}, badge(word)), el("td", {}, counts[k]), el("td", {}, MEANINGS[word])) : null)),
    el("p", {}, "Worst first: what asks for another look before the rest, the lowest score first in each. On pictures orange speaks for the class, blue against it; the stronger the colour, the more."),
    el("p", {class: "note"}, "Pictures stay in the output tree: move this page together with it. Nothing is loaded from a network. The reviewed marks stay in this browser; export them as CSV."),
    X.failed.length ? el("h3", {}, "Images that could not be used") : null,
    el("table", {}, X.failed.map(row => el("tr", {}, row.map(t => el("td", {}, t))))));
}
function theme(turn) {
  const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  if (turn) document.documentElement.dataset.theme = dark ? "light" : "dark";
  colours = {};
  if (state.view === "plots") drawPlots();
}

function key(e) {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  const open = document.getElementById("detail").open, typing = /^(INPUT|SELECT|TEXTAREA)$/.test(e.target.tagName);
  if (typing) { if (e.key === "Escape") document.getElementById("list").focus(); return; }
  const steps = open ? {ArrowLeft: -1, ArrowRight: 1, k: -1, j: 1} : state.view === "list" ? {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, k: -1, j: 1} : {};
  if (e.key in steps) { open ? turnPage(steps[e.key]) : (document.getElementById("list").focus(), step(steps[e.key])); e.preventDefault(); }
  else if (e.key === "Enter" && !open && state.view === "list" && document.activeElement?.tagName !== "BUTTON") { e.preventDefault(); if (state.shown.length) openBox(state.shown[state.at]); }
  else if (e.key === "r") toggleMark();
  else if (e.key === "/") { view("list"); document.getElementById("search").focus(); e.preventDefault(); }
  else if ("1234".includes(e.key) && !open) view(["list", "classes", "plots", "about"][e.key - 1]);
  else if (e.key === "d") theme(true);
  else if (e.key === "?") showKeys();
}
function showKeys() {
  const dialog = document.getElementById("keys");
  dialog.replaceChildren(el("h2", {}, "Keys"), el("table", {}, KEYS.map(([k, t]) => el("tr", {}, el("th", {}, el("kbd", {}, k)), el("td", {}, t)))), el("button", {onclick: () => dialog.close()}, "Close"));
  dialog.showModal();
}

async function start() {
  X = await unpack(document.getElementById("index").textContent.trim());
  prepare();
  marks.load();
  document.getElementById("warnings").append(...X.warnings.map(t => el("p", {class: "warning"}, t)));
  for (const tab of document.querySelectorAll("[role=tab]")) tab.addEventListener("click", () => view(tab.dataset.view));
  document.getElementById("theme").addEventListener("click", () => theme(true));
  document.getElementById("help").addEventListener("click", showKeys);
  document.getElementById("list").addEventListener("scroll", () => requestAnimationFrame(drawCards), {passive: true});
  document.getElementById("detail").addEventListener("click", e => { if (e.target === e.currentTarget) closeBox(); });   // beside it
  document.addEventListener("keydown", key);
  addEventListener("resize", () => state.view === "list" && layout());
  addEventListener("beforeprint", drawPrinted);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme(false));
  drawFilters();
  view("list");
  document.body.dataset.ready = String(Math.round(performance.now()));   // ms since the page was asked for
  globalThis.detxai = {state, refresh, view, openBox, marks, csv, index: X};   // for tests and curious people
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (wanted.has("view")) view(wanted.get("view"));
  if (wanted.has("box")) openBox(+wanted.get("box"));
}
start().catch(error => {
  document.getElementById("status").textContent = error.message;
  throw error;
});
