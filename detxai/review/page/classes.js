// How each class behaves: where its evidence lies, how much that varies, and groups of boxes with evidence elsewhere.
function drawClasses() {
  const place = document.getElementById("classes");
  if (place.childElementCount) return;
  place.append(el("p", {class: "note"}, "Grids are 8 × 8 cells over the box of each report: mean evidence, on the scale beside it. All grids of one class share one scale; scales of different classes differ."));
  if (!X.behaviours.length) place.append(el("p", {class: "empty"}, "No reported box has a map of its class."));
  place.append(...X.behaviours.map(behaviour));
}

function behaviour(b) {
  const most = Math.max(...[b.mean, ...b.groups.map(g => g.mean)].flat(2).map(Math.abs));
  const k = X.classes.findIndex(c => c[0] === b["class"][0]);
  const named = (title, cells, options) => el("figure", {}, gridPicture(cells.flat(), options), el("figcaption", {}, title));
  const wide = Math.max(...b.spread.flat());
  const spread = gridPicture(b.spread.flat(), {most: wide});
  spread.classList.add("spread");
  return el("section", {class: "class"},
    el("h2", {}, b["class"][1], el("span", {class: "score"}, ` ${b.count} boxes`)),
    shares(b.verdicts, `verdicts of ${b["class"][1]}`),
    el("p", {}, `What makes it say ${b["class"][1]}: evidence is ${b.where}; ${percent(b.outside)} of what speaks for it lies outside the boxes.`),
    el("div", {class: "figures"},
      named("mean evidence", b.mean, {most}),
      el("figure", {}, spread, el("figcaption", {}, `spread: standard deviation, 0 to ${number(wide)}`)),
      legend(most, `${b.unit} a cell`)),
    groupsOf(b, most, k),
    examples(`Most typical`, b.typical), examples("Oddest", b.odd));
}
function groupsOf(b, most, k) {
  if (b.groups.length < 2)
    return el("p", {class: "note"}, b.count < 12 ? "Too few boxes for groups." : "No groups: the evidence of these boxes does not fall into kinds (silhouette below 0.25).");
  return el("div", {}, el("h3", {}, `${b.groups.length} groups of alike evidence (silhouette ${number(b.silhouette)})`),
    el("p", {class: "note"}, "A small group with its evidence in one corner, or outside the box, may be a shortcut: look at its pictures."),
    el("div", {class: "groups"}, b.groups.map((g, n) => el("div", {class: "group"},
      gridPicture(g.mean.flat(), {most}),
      el("div", {}, el("b", {}, `${percent(g.boxes.length / b.count)} (${g.boxes.length})`), ` ${g.where}; ${percent(g.outside)} outside; mean score ${number(g.score)}`,
        shares(g.verdicts, "verdicts of this group"),
        el("button", {onclick: () => { state.group = {boxes: g.boxes, name: `${b["class"][1]}, group ${n + 1}`}; Object.assign(state, {cls: String(k), kind: "0"}); state.verdict.clear(); drawFilters(); view("list"); }}, "Show these boxes"))))));
}
function examples(title, boxes) {
  return !boxes.length ? null : el("div", {}, el("h3", {}, title), el("div", {class: "examples"}, boxes.map(i => smallCard(i))));
}
