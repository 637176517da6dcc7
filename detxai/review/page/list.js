// Filters and the list: only the cards on screen exist.
const MEASURE_WORDS = name => name.replaceAll("_", " ");
let columns = 1, rowHeight = 1, cardWidth = 1;

function option(value, text, chosen) { return el("option", {value, selected: chosen}, text); }
function choose(label, options, value, changed) {
  const field = el("select", {onchange: e => changed(e.target.value)}, options.map(([v, t]) => option(v, t, v === value)));
  return el("label", {}, label, field);
}
function counted(column, total) {     // how often each number occurs in a column
  const n = new Array(total).fill(0);
  for (const v of column) for (const k of Array.isArray(v) ? new Set(v) : [v]) n[k]++;
  return n;
}

function drawFilters() {
  const form = document.getElementById("filters"), change = patch => { Object.assign(state, patch); state.at = 0; refresh(); };
  const classes = counted(B["class"], X.classes.length), ofKind = B.verdict.filter((_, i) => state.kind === "" || B.kind[i] === +state.kind), verdicts = counted(ofKind, X.verdicts.length);
  const kinds = counted(B.kind, X.kinds.length), reasons = counted(B.about, X.reasons.length);
  const byCount = reasons.map((n, k) => [n, k]).sort((a, b) => b[0] - a[0]).slice(0, 40);
  const score = (key, value) => el("input", {type: "number", min: 0, max: 1, step: 0.05, value, "aria-label": key === "low" ? "lowest score" : "highest score",
    oninput: e => change({[key]: e.target.value === "" ? +(key === "high") : +e.target.value})});
  fill(form,
    el("label", {}, "Search", el("input", {type: "search", id: "search", value: state.text, placeholder: "path, class, reason", oninput: e => change({text: e.target.value})})),
    choose("Class", [["", "all"], ...X.classes.map((c, k) => [String(k), `${c[1]} (${classes[k]})`])], state.cls, v => change({cls: v})),
    el("fieldset", {}, el("legend", {}, "Verdict"), X.verdicts.map((word, k) => verdicts[k] || state.verdict.has(k) ? el("label", {class: `toggle ${word}`},
      el("input", {type: "checkbox", checked: state.verdict.has(k), onchange: e => { e.target.checked ? state.verdict.add(k) : state.verdict.delete(k); change({}); }}),
      badge(word), ` ${verdicts[k]}`) : null)),
    choose("Kind", [["", "all"], ...X.kinds.map((word, k) => [String(k), `${word} (${kinds[k]})`])], state.kind, v => { change({kind: v}); drawFilters(); }),
    choose("Reason", [["", "all"], ...byCount.map(([n, k]) => [String(k), `${X.reasons[k]} (${n})`])], state.reason, v => change({reason: v})),
    el("label", {}, "Score", el("span", {class: "range"}, score("low", state.low), "to", score("high", state.high))),
    choose("Reviewed", [["", "all"], ["no", "not yet"], ["yes", "reviewed"]], state.seen, v => change({seen: v})),
    choose("Sort", [["severity", "worst first"], ["verdict", "verdict"], ["score", "score"], ["path", "path"], ["class", "class"],
      ...(B.trust.some(v => v !== null) ? [["trust", "trust"]] : []), ...Object.keys(X.measures).map(m => [m, MEASURE_WORDS(m)])], state.sort, v => change({sort: v})),
    el("button", {type: "button", id: "turn", "aria-pressed": String(state.down), title: "Turn the order round", onclick: () => { change({down: !state.down}); drawFilters(); }}, state.down ? "↓ turned" : "↑"),
    state.group ? el("button", {type: "button", class: "chip", onclick: () => { change({group: null}); drawFilters(); }}, `${state.group.name} ×`) : null,
    el("button", {type: "button", onclick: () => { Object.assign(state, {text: "", cls: "", kind: "0", reason: "", low: 0, high: 1, seen: "", group: null, sort: "severity", down: false, at: 0}); state.verdict.clear(); drawFilters(); refresh(); }}, "Reset"),
    el("button", {type: "button", id: "export", onclick: saveMarks}, "Export reviewed (CSV)"));
}

function saveMarks() {
  const link = el("a", {href: URL.createObjectURL(new Blob(["\ufeff", csv()], {type: "text/csv"})), download: `${X.name}-reviewed.csv`});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function refresh() {                  // filters changed: the list, or the plots, anew
  state.shown = filtered();
  const images = new Set(state.shown.map(i => B.image[i])).size;
  document.getElementById("status").textContent =
    `${state.shown.length.toLocaleString("en")} of ${N.toLocaleString("en")} boxes, in ${images.toLocaleString("en")} of ${X.images.path.length.toLocaleString("en")} images`
    + (X.failed.length ? `; ${X.failed.length} images could not be read` : "") + (marks.kept ? "" : "; this browser does not keep the reviewed marks");
  if (state.view === "list") layout();
  if (state.view === "plots") drawPlots();
}

function layout() {
  const list = document.getElementById("list"), width = list.clientWidth - 8;
  columns = Math.max(1, Math.floor(width / 250));
  cardWidth = Math.floor(width / columns);
  rowHeight = Math.round(Math.min(cardWidth * 0.72, 250)) + 118;
  const cards = document.getElementById("cards");
  cards.style.height = `${Math.ceil(state.shown.length / columns) * rowHeight}px`;
  cards.replaceChildren();
  if (!state.shown.length) cards.append(el("p", {class: "empty"}, "No box passes these filters."));
  drawCards();
}

function drawCards() {
  const list = document.getElementById("list"), cards = document.getElementById("cards");
  const first = Math.max(0, Math.floor(list.scrollTop / rowHeight) - 1) * columns;
  const last = Math.min(state.shown.length, (Math.ceil((list.scrollTop + list.clientHeight) / rowHeight) + 1) * columns);
  const there = new Map([...cards.children].map(c => [c.dataset.at, c]));
  for (const [at, c] of there) if (at !== undefined && (at < first || at >= last)) c.remove();
  for (let at = first; at < last; at++) if (!there.has(String(at))) cards.append(card(at));
  mark();
}

function card(at) {
  const i = state.shown[at], own = ownMap(i);
  const box = smallCard(i);
  box.dataset.at = at;
  box.style.cssText = `position:absolute;width:${cardWidth - 10}px;height:${rowHeight - 10}px;transform:translate(${(at % columns) * cardWidth}px,${Math.floor(at / columns) * rowHeight}px)`;
  return box;
}

function smallCard(i, note = "") {    // one box as a picture with its verdict and deciding reason
  const own = ownMap(i), more = B.reasons[i].length - 1;
  return el("article", {class: `card ${verdictOf(i)}${marks.has(i) ? " seen" : ""}`, tabindex: -1, "data-box": i, onclick: () => openBox(i)},
    picture(shownOf(i, own), i, `overlay of ${nameOf(i)}`, {crop: !(own && overlayOf(i, own))}),
    el("h3", {}, el("span", {}, className(i)), el("span", {class: "score"}, B.score[i].toFixed(2))),
    el("p", {class: "line"}, badge(verdictOf(i)), B.kind[i] ? el("span", {class: "kind"}, kindOf(i)) : null, marks.has(i) ? el("span", {class: "kind"}, "✓ reviewed") : null, note ? el("span", {class: "kind"}, note) : null, bagOf(i) ? el("span", {class: "kind", title: "all boxes of a bag stand together"}, `bag ${bagOf(i)}`) : null),
    el("p", {class: "reason"}, B.reasons[i][0] || "", more > 0 ? el("span", {class: "more"}, ` +${more} more`) : null),
    el("p", {class: "path", title: nameOf(i)}, nameOf(i)));
}

function mark() {
  for (const c of document.getElementById("cards").children) c.classList.toggle("at", +c.dataset.at === state.at && document.activeElement?.id === "list");
}
function step(by) {
  state.at = Math.max(0, Math.min(state.shown.length - 1, state.at + by));
  const list = document.getElementById("list"), top = Math.floor(state.at / columns) * rowHeight;
  if (top < list.scrollTop) list.scrollTop = top;
  if (top + rowHeight > list.scrollTop + list.clientHeight) list.scrollTop = top + rowHeight - list.clientHeight;
  drawCards();
}

function drawPrinted() {              // paper has no scrolling: the first boxes of the list as a table
  for (const image of document.querySelectorAll("#classes img")) image.loading = "eager";
  const most = 300, shown = state.shown.slice(0, most);
  document.getElementById("printed").replaceChildren(
    el("caption", {}, `${X.name}: the first ${shown.length} of ${state.shown.length} boxes chosen`),
    el("tr", {}, ["image", "box", "class", "score", "verdict", "why"].map(t => el("th", {}, t))),
    ...shown.map(i => el("tr", {}, [path(i), `#${B.id[i]}`, className(i), B.score[i].toFixed(2), `${SIGNS[verdictOf(i)]} ${verdictOf(i)}`, (verdictOf(i) === "supported" ? B.reasons[i].slice(0, 1) : B.reasons[i]).join("; ")].map(t => el("td", {}, t)))));
}
