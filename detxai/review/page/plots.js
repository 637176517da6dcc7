// Score against each measure of evidence, for the boxes chosen; a click opens the nearest box.
const PLOT = {width: 340, height: 250, left: 44, right: 10, top: 10, bottom: 38};

function drawPlots() {
  const place = document.getElementById("plots");
  const names = Object.keys(X.measures);
  place.replaceChildren(el("p", {class: "note"}, `Each point is one of the ${state.shown.length.toLocaleString("en")} boxes chosen above; the score axis always runs from 0 to 1. Click a point to open its box.`),
    el("p", {class: "keyline"}, X.verdicts.map(word => badge(word))),
    names.length ? el("div", {class: "plots"}, names.map(plot)) : el("p", {class: "empty"}, "This run has no evidence to plot (--evidence none)."));
}
function span(name) {                 // shares have fixed ends; the rest runs over all boxes of the run
  const column = X.measures[name];
  let low = Infinity, high = -Infinity;
  for (const v of column) if (v !== null) { if (v < low) low = v; if (v > high) high = v; }
  if (/in \[0, 1\]/.test(X.meanings[name] || "")) return [0, 1];
  if (/in \[-1, 1\]/.test(X.meanings[name] || "")) return [-1, 1];
  return low === high ? [low - 1, high + 1] : [Math.min(low, 0), Math.max(high, 0)];
}
function ticks(low, high) {
  const raw = (high - low) / 4, power = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 2.5, 5, 10].map(f => f * power).find(f => f >= raw);
  const found = [];
  for (let v = Math.ceil(low / size) * size; v <= high + size / 1e6; v += size) found.push(Math.abs(v) < size / 1e6 ? 0 : v);
  return found;
}
function plot(name) {
  const {width, height, left, right, top, bottom} = PLOT, column = X.measures[name], [low, high] = span(name);
  const ratio = window.devicePixelRatio || 1;
  const canvas = el("canvas", {width: width * ratio, height: height * ratio, style: `width:${width}px;height:${height}px`, role: "img", "aria-label": `score against ${MEASURE_WORDS(name)}`});
  const x = v => left + (v - low) / (high - low) * (width - left - right), y = v => height - bottom - v * (height - top - bottom);
  const g = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink"), line = style.getPropertyValue("--line");
  g.scale(ratio, ratio);
  g.font = "11px system-ui, sans-serif"; g.lineWidth = 1;
  for (const v of ticks(low, high)) { g.strokeStyle = line; g.beginPath(); g.moveTo(x(v), top); g.lineTo(x(v), height - bottom); g.stroke(); g.fillStyle = ink; g.textAlign = "center"; g.fillText(number(v), x(v), height - bottom + 14); }
  for (const v of [0, 0.25, 0.5, 0.75, 1]) { g.strokeStyle = line; g.beginPath(); g.moveTo(left, y(v)); g.lineTo(width - right, y(v)); g.stroke(); g.fillStyle = ink; g.textAlign = "right"; g.fillText(String(v), left - 5, y(v) + 4); }
  g.textAlign = "center"; g.fillText(MEASURE_WORDS(name), (left + width - right) / 2, height - 6);
  g.save(); g.translate(11, (top + height - bottom) / 2); g.rotate(-Math.PI / 2); g.fillText("score", 0, 0); g.restore();
  const shown = state.shown.filter(i => column[i] !== null);
  g.globalAlpha = shown.length > 2000 ? 0.35 : shown.length > 300 ? 0.6 : 0.9;
  for (let n = shown.length; n--;) point(g, x(column[shown[n]]), y(B.score[shown[n]]), verdictOf(shown[n]), style);
  canvas.addEventListener("click", e => {
    let best = -1, near = 144;
    for (const i of shown) { const d = (x(column[i]) - e.offsetX) ** 2 + (y(B.score[i]) - e.offsetY) ** 2; if (d < near) { near = d; best = i; } }
    if (best >= 0) openBox(best);
  });
  return el("figure", {title: X.meanings[name]}, canvas, el("figcaption", {}, X.meanings[name]));
}
function point(g, x, y, verdict, style) {       // colour and shape both tell the verdict
  g.strokeStyle = g.fillStyle = colours[verdict] ||= style.getPropertyValue(`--${verdict}`);
  g.lineWidth = 1.6;
  g.beginPath();
  if (verdict === "unsupported") { g.moveTo(x - 3, y - 3); g.lineTo(x + 3, y + 3); g.moveTo(x + 3, y - 3); g.lineTo(x - 3, y + 3); g.stroke(); }
  else if (verdict === "weak") { g.moveTo(x, y - 3.4); g.lineTo(x + 3.2, y + 2.6); g.lineTo(x - 3.2, y + 2.6); g.closePath(); g.fill(); }
  else { g.arc(x, y, 2.4, 0, 7); verdict === "supported" ? g.fill() : g.stroke(); }
}
let colours = {};
