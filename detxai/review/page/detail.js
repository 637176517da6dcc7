// One box: every picture of it, the numbers in words, methods side by side, contrast and edges.
const EDGE = ["left", "top", "right", "bottom"];

function openBox(i) {
  state.open = i;
  const at = state.shown.indexOf(i);
  if (at >= 0) state.at = at;
  drawDetail();
  const dialog = document.getElementById("detail");
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}
function closeBox() { document.getElementById("detail").close(); document.getElementById("list").focus(); drawCards(); }
function turnPage(by) {
  const at = state.shown.indexOf(state.open) + by;
  if (at >= 0 && at < state.shown.length) openBox(state.shown[at]);
}

function drawDetail() {
  const i = state.open, image = B.image[i], at = state.shown.indexOf(i), own = ownMap(i);
  const stage = el("div", {id: "stage"});
  const show = (address, alt, box = i) => stage.replaceChildren(picture(address, box, alt));
  show(shownOf(i, own), `overlay of ${nameOf(i)}`);
  fill(document.getElementById("detail"),
    el("header", {},
      el("h2", {}, className(i), el("span", {class: "score"}, ` ${B.score[i].toFixed(2)} `), badge(verdictOf(i)), B.kind[i] ? el("span", {class: "kind"}, kindOf(i)) : null),
      el("span", {class: "grow path"}, nameOf(i), at >= 0 ? ` · ${at + 1} of ${state.shown.length}` : ""),
      el("button", {onclick: () => turnPage(-1), disabled: at <= 0, title: "Previous (←)"}, "←"),
      el("button", {onclick: () => turnPage(1), disabled: at < 0 || at >= state.shown.length - 1, title: "Next (→)"}, "→"),
      el("button", {onclick: toggleMark, "aria-pressed": String(marks.has(i)), title: "Reviewed (r)"}, marks.has(i) ? "✓ reviewed" : "mark as reviewed"),
      el("button", {onclick: closeBox, title: "Close (Esc)"}, "✕")),
    el("div", {class: "columns"},
      el("div", {}, stage, thumbs(i, show)),
      el("div", {}, why(i), inWords(i, own), classesHere(i), contrasts(i), edges(i), measures(i), maps(i), mates(i), otherView(i))));
}
function toggleMark() {
  const i = state.open >= 0 && document.getElementById("detail").open ? state.open : state.shown[state.at];
  if (i === undefined) return;
  marks.toggle(i);
  if (document.getElementById("detail").open) drawDetail();
  if (state.view === "list") layout();
}

function mapName(v, i) {
  const [method, gradient, target, asked, against] = v;
  const what = target === "class" ? (asked ? `as ${asked}` : className(i)) : target === "contrast" ? `${asked || className(i)}, not ${against || B.rival[i] || "the next"}` : EDGE.includes(target) ? "box edges" : target;
  return [what, method + (gradient === "plain" ? "" : ` · ${gradient}`)];
}
function thumbs(i, show) {            // rows: what is explained; columns: methods
  const rows = new Map(), methods = [];
  const put = (row, method, address) => {
    if (!methods.includes(method)) methods.push(method);
    if (!rows.has(row)) rows.set(row, new Map());
    if (address) rows.get(row).set(method, address);
  };
  for (const map of B.maps[i]) { const [what, method] = mapName(X.variants[map[0]], i); put(what, method, overlayOf(i, map)); }
  const button = (address, alt, box = i) => el("button", {class: "thumb", onclick: () => show(address, alt, box), title: alt}, picture(address, box, alt));
  const overview = overviewOf(i);
  const table = el("table", {class: "side"}, el("caption", {}, "Methods side by side (click to enlarge)"),
    el("tr", {}, el("th", {}), methods.map(m => el("th", {title: X.methods[m.split(" ")[0]] || m}, m))),
    [...rows].map(([what, found]) => el("tr", {}, el("th", {}, what), methods.map(m => el("td", {}, found.has(m) ? button(found.get(m), `${what}, ${m}`) : "–")))));
  const single = rows.size === 1 && methods.length === 1;
  return el("div", {}, el("div", {class: "strip"},
      overview ? button(overview, "all boxes of this picture") : null,
      otherViews(i).filter(k => MATES[k].length).map(k => button(overviewOf(MATES[k][0]), `the other view: ${X.images.path[k]}`, MATES[k][0])),
      el("button", {class: "thumb", onclick: () => stage().replaceChildren(el("div", {class: "picture"}, sketch(i))), title: "where the boxes lie, and the 8 × 8 grid"}, sketch(i))),
    single ? null : table);
}
const stage = () => document.getElementById("stage");

function why(i) {
  const list = B.reasons[i].length ? el("ul", {}, B.reasons[i].map(t => el("li", {}, t))) : el("p", {}, "No evidence was asked for (--evidence none).");
  const match = B.match[i] ? el("p", {}, `By the labels: ${B.match[i]}.`) : null;
  const trust = B.trust[i] === null ? null : el("p", {}, `Trust ${B.trust[i].toFixed(2)}: the share of such boxes that were right among labelled ones.`);
  return el("section", {}, el("h3", {}, "Why"), list, trust, match, el("p", {class: "note"}, "Not supported means: look again. No verdict clears a box."));
}
function inWords(i, own) {
  if (!own) return null;
  const [k, , , converged, evaluations, value, ground, bound, net, inside, , off] = own, v = X.variants[k];
  const method = X.methods[v[0]] || v[0], compared = v[5].startsWith("auto:#") ? `${v[5].slice(5)}, the picture's own ground` : v[5].replace("auto:", "");
  const said = [`${method[0].toUpperCase()}${method.slice(1)}${v[1] === "plain" ? "" : ` under ${v[1]}`}${compared === "none" ? "" : `, compared with ${compared}`}.`];
  if (ground !== null && v[1] === "plain") said.push(`The log-odds of ${className(i)} rise from ${number(ground)} there to ${number(value)} in this picture.`);
  if (inside !== null) said.push(`${percent(inside)} of all that speaks for it lies in the box, net ${number(net)}.`);
  if (bound !== null) said.push(converged ? `The sum of its map is right to ${percent(bound)}.` : `Its map did not converge (its sum may be ${percent(bound)} off): read with care.`);
  if (off != null) said.push(`The map itself may be ${percent(off)} off.`);
  said.push(`${evaluations} evaluations of the network.`);
  return el("section", {}, el("h3", {}, "In words"), el("p", {}, said.join(" ")));
}
function classesHere(i) {
  const top = B.top[i];
  return top.length < 2 ? null : el("section", {}, el("h3", {}, "Classes at this box"), el("table", {class: "bars"}, top.map(([name, score]) =>
    el("tr", {}, el("th", {}, name), el("td", {}, el("span", {class: "bar", style: `width:${100 * score}%`})), el("td", {}, score.toFixed(3))))));
}
function contrasts(i) {
  return !B.contrasts[i].length ? null : el("section", {}, el("h3", {}, "Why not another class"), B.contrasts[i].map(([name, net, plus, minus, beside, converged]) =>
    el("p", {}, `${className(i)}, not ${name}: in the box ${number(plus)} logits speak for ${className(i)} and ${number(-minus)} for ${name}, net ${number(net)}; outside it net ${number(beside)}.${converged === false ? " Not converged." : ""}`)));
}
function edges(i) {
  const found = B.maps[i].filter(m => EDGE.includes(X.variants[m[0]][2]));
  return !found.length ? null : el("section", {}, el("h3", {}, "Edges of the box"), el("table", {},
    el("tr", {}, ["edge", "method", "at", "without content", "its own third of the box"].map(t => el("th", {}, t))),
    found.map(m => { const v = X.variants[m[0]]; return el("tr", {}, [v[2], v[0], `${number(m[5])} px`, m[6] === null ? "–" : `${number(m[6])} px`, m[10] === null ? "–" : percent(m[10])].map(t => el("td", {}, t))); })));
}
function measures(i) {
  const rows = Object.entries(X.measures).filter(([, column]) => column[i] !== null);
  return !rows.length ? null : el("section", {}, el("h3", {}, "Measures"), el("table", {class: "measures"}, rows.map(([name, column]) =>
    el("tr", {}, el("th", {}, MEASURE_WORDS(name)), el("td", {}, number(column[i])), el("td", {}, X.meanings[name])))));
}
function maps(i) {
  return el("details", {}, el("summary", {}, `${B.maps[i].length} map${B.maps[i].length > 1 ? "s" : ""} of this box`), el("table", {},
    el("tr", {}, ["what", "method", "compared with", "sum off by at most", "map by about", "in the box", "evaluations"].map(t => el("th", {}, t))),
    B.maps[i].map(m => { const v = X.variants[m[0]], [what, method] = mapName(v, i);
      return el("tr", {}, [EDGE.includes(v[2]) ? v[2] : what, method, v[5], m[7] === null ? "no promise" : percent(m[7]) + (m[3] ? "" : ", not converged"), m[11] == null ? "–" : percent(m[11]), m[9] === null ? "–" : percent(m[9]), m[4]].map(t => el("td", {}, String(t)))); })));
}
const boxes = found => el("ul", {class: "mates"}, found.map(k =>
  el("li", {}, el("button", {onclick: () => openBox(k)}, `#${B.id[k]} ${className(k)} ${B.score[k].toFixed(2)} `, badge(verdictOf(k)), B.kind[k] ? ` ${kindOf(k)}` : ""))));
function mates(i) {
  const found = MATES[B.image[i]].filter(k => k !== i);
  return !found.length ? null : el("section", {}, el("h3", {}, "Other boxes of this picture"), boxes(found));
}
function otherViews(i) {              // the other images of the same bag
  const bag = X.images.bag[B.image[i]];
  return bag === null ? [] : [...X.images.bag.keys()].filter(k => X.images.bag[k] === bag && k !== B.image[i]);
}
function otherView(i) {
  const images = otherViews(i);
  return !images.length ? null : el("section", {}, el("h3", {}, "The other view of this bag"), images.map(k => {
    const [first] = MATES[k];            // the strongest box of that view, whose map stands for a view without an overview
    const shown = first === undefined ? null : picture(overviewOfImage(k) || shownOf(first, ownMap(first)), first, `the other view, ${X.images.path[k]}`);
    return el("div", {}, X.images.path[k], shown, first === undefined ? ": no box" : boxes(MATES[k]));
  }));
}
