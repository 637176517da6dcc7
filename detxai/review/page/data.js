// The index: unpacked once, then columns of boxes, worst first.
let X, B, N, GRIDS, MATES;           // MATES: image -> its boxes
const REVIEWED = "detxai.reviewed";
const state = {view: "list", text: "", cls: "", verdict: new Set(), kind: "0", reason: "", low: 0, high: 1,
               seen: "", group: null, sort: "severity", down: false, shown: [], at: 0, open: -1};

async function unpack(text) {
  if (typeof DecompressionStream === "undefined")
    throw new Error("This browser is too old for the page: Chrome or Edge 111, Firefox 113, Safari 16.4 or newer.");
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function prepare() {
  B = X.boxes; N = B.image.length;
  GRIDS = Int8Array.from(atob(X.grids), c => c.charCodeAt(0) << 24 >> 24);
  MATES = X.images.path.map(() => []);
  B.image.forEach((image, i) => MATES[image].push(i));
  B.text = B.image.map((image, i) =>
    `${X.images.path[image]} #${B.id[i]} ${className(i)} ${B.reasons[i].join(" ")}`.toLowerCase());
}

const path = i => X.images.path[B.image[i]];
const className = i => X.classes[B["class"][i]][1];
const verdictOf = i => X.verdicts[B.verdict[i]];
const kindOf = i => X.kinds[B.kind[i]];
const nameOf = i => `${path(i)} #${B.id[i]}`;
const bagOf = i => X.images.bag[B.image[i]];
const keyOf = i => `${X.images.key[B.image[i]]}#${B.id[i]}`;
const folderOf = p => p.slice(0, p.lastIndexOf("/") + 1);
const address = p => "./" + (X.base + p).split("/").map(encodeURIComponent).join("/");

function overlayOf(i, map) {          // address of a map's picture, or null
  const ending = X.variants[map[0]][6];
  if (!ending) return null;
  const p = path(i), id = String(B.id[i]).padStart(2, "0");
  return address(`${p}.d${id}.${ending}`);
}
function shownOf(i, map) {            // the map's own picture, else that of all boxes
  return (map && overlayOf(i, map)) || overviewOf(i);
}
function overviewOf(i) { return overviewOfImage(B.image[i]); }
function overviewOfImage(k) {
  const ending = X.images.overview[k];
  return ending ? address(`${X.images.path[k]}.${ending}`) : null;
}
function ownMap(i) {                  // the map that was judged
  return B.maps[i].find(m => { const v = X.variants[m[0]]; return v[2] === "class" && v[3] === null; });
}
function gridOf(map) {                // 64 numbers in the map's unit, or null
  if (!map || map[1] === null) return null;
  return Array.from(GRIDS.subarray(64 * map[1], 64 * map[1] + 64), v => v / 127 * map[2]);
}

const marks = {
  all: new Map(), kept: true,
  load() {
    try { this.all = new Map(JSON.parse(localStorage.getItem(REVIEWED) || "[]")); }
    catch { this.kept = false; }
  },
  has(i) { return this.all.has(keyOf(i)); },
  toggle(i) {
    if (!this.all.delete(keyOf(i))) this.all.set(keyOf(i), new Date().toISOString());
    try { localStorage.setItem(REVIEWED, JSON.stringify([...this.all])); } catch { this.kept = false; }
  },
};

function filtered() {                 // numbers of the boxes that all filters let through, in order
  const words = state.text.toLowerCase().split(/\s+/).filter(Boolean), found = [];
  const inGroup = state.group && new Set(state.group.boxes);
  for (let i = 0; i < N; i++) {
    if (state.kind !== "" && B.kind[i] !== +state.kind) continue;
    if (state.cls !== "" && B["class"][i] !== +state.cls) continue;
    if (state.verdict.size && !state.verdict.has(B.verdict[i])) continue;
    if (B.score[i] < state.low || B.score[i] > state.high) continue;
    if (state.reason !== "" && !B.about[i].includes(+state.reason)) continue;
    if (inGroup && !inGroup.has(i)) continue;
    if (state.seen !== "" && marks.has(i) !== (state.seen === "yes")) continue;
    if (words.length && !words.every(w => B.text[i].includes(w))) continue;
    found.push(i);
  }
  return together(ordered(found));
}

function together(boxes) {            // both views of a bag where the first of them is, as detxai list has them
  if (!X.images.bag.some(bag => bag !== null)) return boxes;
  const bags = new Map();
  for (const i of boxes) {
    const bag = X.images.bag[B.image[i]] ?? i;   // a box of no bag stays where it is
    if (!bags.has(bag)) bags.set(bag, []);
    bags.get(bag).push(i);
  }
  return [...bags.values()].flat();
}

function ordered(found) {
  const key = state.sort;
  if (key !== "severity") {
    const column = key === "path" ? B.image.map((image, i) => X.images.path[image])
                 : key === "class" ? B["class"].map((_, i) => className(i))
                 : key === "score" ? B.score : key === "verdict" ? B.verdict : key === "trust" ? B.trust : X.measures[key];
    const known = found.filter(i => column[i] != null), rest = found.filter(i => column[i] == null);
    known.sort((a, b) => column[a] < column[b] ? -1 : column[a] > column[b] ? 1 : a - b);
    if (state.down) known.reverse();
    return known.concat(rest);
  }
  return state.down ? found.reverse() : found;
}

function csv() {                      // what was reviewed, for other programs; no cell starts a formula
  const cell = v => { let s = String(v ?? ""); if (/^[=+\-@\t\r]/.test(s)) s = "'" + s; return `"${s.replaceAll('"', '""')}"`; };
  const rows = [["path", "id", "kind", "class", "score", "verdict", "reviewed"]];
  for (let i = 0; i < N; i++)
    if (marks.has(i)) rows.push([path(i), B.id[i], kindOf(i), className(i), B.score[i], verdictOf(i), marks.all.get(keyOf(i))]);
  return rows.map(r => r.map(cell).join(",")).join("\r\n") + "\r\n";
}
