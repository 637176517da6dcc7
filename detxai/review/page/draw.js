// Elements and small drawings. Text goes in as text, never as markup.
const SIGNS = {unsupported: "✕", weak: "▲", unknown: "?", supported: "●", none: "○"};

function el(tag, attributes = {}, ...children) {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes))
    if (k.startsWith("on")) e.addEventListener(k.slice(2), v);
    else if (v !== null && v !== undefined && v !== false) e.setAttribute(k, v === true ? "" : v);
  e.append(...children.flat().filter(c => c !== null && c !== undefined));
  return e;
}
// As replaceChildren, but null stands for nothing.
const fill = (place, ...children) => place.replaceChildren(...children.flat().filter(c => c !== null && c !== undefined));
function svg(tag, attributes = {}, ...children) {
  const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  e.append(...children.flat());
  return e;
}
const percent = v => v === null ? "–" : v > 0 && v < 0.005 ? "< 1 %" : `${Math.round(100 * v)} %`;
const number = v => v === null || v === undefined ? "–" : typeof v === "number" ? String(+v.toPrecision(3)) : String(v);

const badge = verdict => el("span", {class: `badge ${verdict}`}, el("b", {"aria-hidden": "true"}, SIGNS[verdict]), " ", verdict === "none" ? "no evidence" : verdict);

// For: orange, against: blue, none: the ground. Both on one scale, `most` = full colour.
function heat(value, most) {
  const share = most > 0 ? Math.min(Math.abs(value) / most, 1) : 0;
  return `color-mix(in oklab, var(${value < 0 ? "--against" : "--for"}) ${Math.round(100 * share)}%, var(--ground))`;
}
function gridPicture(cells, {most = Math.max(...cells.map(Math.abs)), title = ""} = {}) {
  const picture = svg("svg", {viewBox: "0 0 8 8", class: "grid", role: "img"}, svg("title", {}, title));
  cells.forEach((v, k) => {
    const cell = svg("rect", {x: k % 8, y: k >> 3, width: 1.02, height: 1.02}, svg("title", {}, `row ${1 + (k >> 3)}, column ${1 + k % 8}: ${number(v)}`));
    cell.style.fill = heat(v, most);
    picture.append(cell);
  });
  return picture;
}
// The picture's frame with all its boxes and, in box i, its grid: what is seen where no overlay is.
function sketch(i) {
  const image = B.image[i], w = X.images.width[image] || 1, h = X.images.height[image] || 1;
  const out = svg("svg", {viewBox: `0 0 ${w} ${h}`, class: "sketch", role: "img"}, svg("title", {}, "where the boxes of this picture lie"));
  out.append(svg("rect", {x: 0, y: 0, width: w, height: h, class: "frame"}));
  for (const k of MATES[image]) {
    if (k === i) continue;
    const [l, t, r, b] = B.box[k];
    out.append(svg("rect", {x: l, y: t, width: r - l, height: b - t, class: "other"}));
  }
  const [l, t, r, b] = B.box[i], cells = gridOf(ownMap(i)), most = cells && Math.max(...cells.map(Math.abs));
  (cells || []).forEach((v, k) => {
    const cell = svg("rect", {x: l + (k % 8) * (r - l) / 8, y: t + (k >> 3) * (b - t) / 8, width: (r - l) / 8, height: (b - t) / 8});
    cell.style.fill = heat(v, most);
    out.append(cell);
  });
  out.append(svg("rect", {x: l, y: t, width: r - l, height: b - t, class: "own"}));
  return out;
}
// The surroundings of box i on the picture of all boxes of its image; null where the box takes most of it, or lies flat.
function cropped(i, image) {
  const w = X.images.width[B.image[i]], h = X.images.height[B.image[i]], [l, t, r, b] = B.box[i];
  const side = Math.max(1.8 * Math.max(r - l, b - t), 0.25 * Math.max(w, h)), cw = Math.min(side, w), ch = Math.min(side, h);
  if (!w || !h || side > 0.8 * Math.max(w, h) || cw > 1.25 * ch) return null;
  const x = Math.min(Math.max((l + r - cw) / 2, 0), w - cw), y = Math.min(Math.max((t + b - ch) / 2, 0), h - ch);
  image.style.cssText = `left:${-100 * x / cw}%;top:${-100 * y / ch}%;width:${100 * w / cw}%`;
  const out = el("div", {class: "crop"}, image);
  out.style.aspectRatio = cw / ch;
  return out;
}
// An image that comes when it is near the screen, or the sketch where there is none.
function picture(address, i, alt, {crop = false} = {}) {
  const frame = el("div", {class: "picture"});
  if (!address) { frame.append(sketch(i)); return frame; }
  const image = el("img", {loading: "lazy", decoding: "async", alt, src: address,
    onerror: () => frame.replaceChildren(sketch(i), el("small", {}, "picture not found beside this page"))});
  frame.append((crop && cropped(i, image)) || image);
  return frame;
}
function shares(counts, label) {      // one bar of verdicts: pattern and colour, with words
  const total = counts.reduce((a, b) => a + b, 0) || 1;
  const bar = el("div", {class: "shares", role: "img", "aria-label": label});
  counts.forEach((n, k) => { if (n) {
    const share = n / total, word = X.verdicts[k];
    bar.append(el("span", {class: word, style: `flex:${n}`, title: `${n} ${word}`}, share > 0.12 ? `${SIGNS[word]} ${percent(share)}` : share > 0.04 ? SIGNS[word] : ""));
  }});
  return bar;
}
function legend(most, unit = "logits a cell") {
  return el("div", {class: "legend"}, `against −${number(most)}`, el("i"), `for +${number(most)} ${unit}`);
}
