"use strict";
const report = JSON.parse(document.getElementById("report").textContent);
const views = JSON.parse(document.getElementById("views").textContent);
const net = report.about.network, L = net.depth, H = net.num_heads, side = net.side, cells = views.cells;
const byId = id => document.getElementById(id);
const ROLE_COLOURS = {local: "#2a7f9e", between: "#c9c5ba", global: "#d9683c", uniform: "#f0cf65", sink: "#6a3d7c", cut: "#f1efeb"};
const there = (l, h) => report.roles[0][0][l][h] !== "cut";
const MEASURES = {
  distance: "mean distance", entropy: "entropy", relative_entropy: "relative entropy", within_1: "within 1",
  within_2: "within 2", within_4: "within 4", sink: "sink", on_condition: "on condition", same_segment: "same segment",
};
const first = views.items.filter(v => v.image === views.items[0].image && v.half === 0);
const state = {image: first[0].image, half: 0, t: first[Math.floor(first.length / 2)].timestep, layer: 0, head: 0,
               query: views.queries[Math.floor(views.queries.length / 2)], base: "clean",
               measure: "roles", mapHalf: 0, label: 0, part: "attention_gate", partT: 0, branchHalf: 0, importanceT: 0, all: false};

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element[name] = value;
    else if (name === "style") element.style.cssText = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}
function choice(label, options, key, redraw) {
  const buttons = options.map(([value, text]) => make("button",
    {"aria-pressed": state[key] === value, onclick: () => { state[key] = value; redraw(); }}, text));
  return make("span", {class: "choice"}, label, make("span", {class: "buttons"}, ...buttons));
}
const percent = x => (100 * x).toFixed(Math.abs(x) < 0.0995 ? 1 : 0) + "%";
const number = x => Math.abs(x) >= 100 ? x.toFixed(0) : Math.abs(x) >= 0.01 || x === 0 ? x.toFixed(2) : x.toExponential(1);
function mixed(stops, x) {
  x = Math.min(Math.max(x, 0), 1) * (stops.length - 1);
  const i = Math.min(Math.floor(x), stops.length - 2), f = x - i;
  return "rgb(" + stops[i].map((a, c) => Math.round(a + f * (stops[i + 1][c] - a))) + ")";
}
const BLUES = [[247, 250, 253], [198, 219, 239], [107, 174, 214], [33, 113, 181], [8, 48, 107]];
const ORANGES = [[255, 250, 244], [253, 208, 162], [253, 141, 60], [217, 72, 1], [110, 30, 3]];
const BOTH = [[5, 72, 120], [120, 170, 205], [247, 247, 247], [240, 150, 110], [160, 40, 10]];
const blue = x => mixed(BLUES, x), orange = x => mixed(ORANGES, x);

function sharp(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = width * ratio; canvas.height = height * ratio;
  canvas.style.width = width + "px"; canvas.style.height = height + "px";
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = "11px system-ui, 'Liberation Sans', Arial, sans-serif";
  return pen;
}
function tell(canvas, text) {
  canvas.onmousemove = event => {
    const told = text(event.offsetX, event.offsetY);
    byId("tip").hidden = !told;
    if (told) {
      byId("tip").textContent = told;
      byId("tip").style.left = Math.min(event.clientX + 14, innerWidth - 310) + "px";
      byId("tip").style.top = event.clientY + 14 + "px";
    }
  };
  canvas.onmouseleave = () => { byId("tip").hidden = true; };
}
/* rows x columns cells with labels on both axes; options: title, cell [w, h], xs, ys, xLabel, yLabel, colour, told, click, scale */
function heat(values, options) {
  const [w, h] = options.cell, left = 46, top = 6, rows = values.length, columns = values[0].length;
  const canvas = make("canvas"), width = left + columns * w + 6, height = top + rows * h + 34;
  const pen = sharp(canvas, width, height);
  values.forEach((row, i) => row.forEach((value, j) => {
    pen.fillStyle = options.colour(value);
    const gap = Math.min(w, h) > 14 ? 1 : 0;
    pen.fillRect(left + j * w, top + i * h, w - gap, h - gap);
    if (options.marked && options.marked(i, j)) {
      pen.strokeStyle = "#1d2733"; pen.lineWidth = 2; pen.strokeRect(left + j * w, top + i * h, w - 1, h - 1);
    }
  }));
  pen.fillStyle = "#5d6b7a"; pen.textBaseline = "middle"; pen.textAlign = "right";
  const stepY = Math.ceil(13 / h), widest = Math.max(...options.xs.map(x => pen.measureText(x).width)) + 6, stepX = Math.ceil(widest / w);
  options.ys.forEach((y, i) => { if (i % stepY === 0) pen.fillText(y, left - 5, top + (i + 0.5) * h); });
  pen.textAlign = "center";
  options.xs.forEach((x, j) => { if (j % stepX === 0) pen.fillText(x, left + (j + 0.5) * w, top + rows * h + 9); });
  pen.fillText(options.xLabel, left + columns * w / 2, top + rows * h + 25);
  pen.save(); pen.translate(10, top + rows * h / 2); pen.rotate(-Math.PI / 2); pen.fillText(options.yLabel, 0, 0); pen.restore();
  const at = (x, y) => [Math.floor((y - top) / h), Math.floor((x - left) / w)];
  const inside = (i, j) => i >= 0 && j >= 0 && i < rows && j < columns;
  tell(canvas, (x, y) => { const [i, j] = at(x, y); return inside(i, j) ? options.told(i, j) : ""; });
  if (options.click) {
    canvas.style.cursor = "pointer";
    canvas.onclick = event => { const [i, j] = at(event.offsetX, event.offsetY); if (inside(i, j)) options.click(i, j); };
  }
  const parts = [make("h3", {}, options.title), canvas];
  if (options.scale) parts.push(scaleBar(...options.scale, columns * w, left));
  return make("div", {}, ...parts);
}
function scaleBar(low, high, colour, width, left) {
  const canvas = make("canvas"), wide = Math.max(Math.min(width, 160), 90), pen = sharp(canvas, left + wide + 6, 28);
  for (let i = 0; i < wide; i++) { pen.fillStyle = colour(low + (high - low) * i / (wide - 1)); pen.fillRect(left + i, 2, 1, 9); }
  pen.fillStyle = "#5d6b7a"; pen.textBaseline = "top"; pen.textAlign = "left"; pen.fillText(number(low), left, 14);
  pen.textAlign = "right"; pen.fillText(number(high), left + wide, 14);
  return canvas;
}
const numbers = count => Array.from({length: count}, (_, i) => String(i));
const flat = values => values.flat(Infinity);
const cellOf = (columns, rows, width, height, most, least = 6) => Math.max(least, Math.min(most, Math.floor(width / columns), Math.floor(height / rows)));

/* ---- where a patch looks ---- */
const decoded = new Map();
function bytes(text) { return Uint8Array.from(atob(text), c => c.charCodeAt(0)); }
function viewAt(image, half, t) { return views.items.find(v => v.image === image && v.half === half && v.timestep === t); }
function open(view) {
  if (!decoded.has(view)) decoded.set(view, {weights: bytes(view.weights), largest: new Float32Array(bytes(view.largest).buffer)});
  return decoded.get(view);
}
function weightsOf(view, layer, head, slot) {
  if (!there(layer, head)) return Array(cells * cells).fill(0);
  const {weights, largest} = open(view), K = cells * cells, row = (layer * H + head) * views.queries.length + slot;
  return Array.from(weights.subarray(row * K, (row + 1) * K), w => w / 255 * largest[row]);
}
function nearestSlot(query) {
  const [r, c] = [Math.floor(query / side), query % side];
  const far = q => (Math.floor(q / side) - r) ** 2 + (q % side - c) ** 2;
  return views.queries.reduce((best, q, i) => far(q) < far(views.queries[best]) ? i : best, 0);
}
const pictures = new Map();
function picture(uri, then) {
  if (!pictures.has(uri)) { const image = new Image(); image.src = uri; pictures.set(uri, image); }
  const image = pictures.get(uri);
  if (image.complete && image.naturalWidth) then(image); else image.addEventListener("load", () => then(image), {once: true});
}
function drawLook() {
  const view = viewAt(state.image, state.half, state.t), slot = nearestSlot(state.query);
  state.query = views.queries[slot];
  const unique = key => [...new Set(views.items.map(v => v[key]))].sort((a, b) => a - b);
  const renew = () => { if (!viewAt(state.image, state.half, state.t)) Object.assign(state, (v => ({half: v.half, t: v.timestep}))(views.items.find(v => v.image === state.image))); drawLook(); };
  byId("look-controls").replaceChildren(
    choice("timestep", unique("timestep").map(t => [t, String(report.timesteps[t])]), "t", renew),
    choice("label", unique("half").map(h => [h, report.halves[h] === "conditional" ? "given" : "none"]), "half", renew),
    choice("picture", [["clean", "clean"], ["noised", "as the network sees it"], ["predicted", "as it predicts it"]], "base", drawLook));
  byId("thumbs").replaceChildren(...unique("image").map(i => make("figure",
    {class: i === state.image ? "on" : "", onclick: () => { state.image = i; renew(); }},
    make("img", {src: views.clean[i], alt: "image " + i}), report.about.images[i])));
  const uris = {clean: views.clean[state.image], noised: view.noised, predicted: view.predicted};
  const t = report.timesteps[state.t];
  byId("triple").replaceChildren(...[["clean", "image"], ["noised", "with noise, t = " + t], ["predicted", "predicted from it"]].map(([key, text]) =>
    make("figure", {}, make("img", {src: uris[key], alt: text}), text)));
  const weights = weightsOf(view, state.layer, state.head, slot);
  drawPicture(byId("look"), uris[state.base], weights);
  drawGrid(view, slot);
  byId("reading").textContent = read(weights);
  history.replaceState(null, "", "#" + ["image", "t", "half", "layer", "head", "query"].map(k => k + "=" + state[k]).join("&"));
}
function drawPicture(canvas, uri, weights) {
  const size = 400, pen = sharp(canvas, size, size), most = Math.max(...weights, 1e-9), w = size / cells, p = size / side;
  picture(uri, image => {
    pen.imageSmoothingEnabled = false;
    pen.drawImage(image, 0, 0, size, size);
    weights.forEach((a, i) => {
      pen.fillStyle = `rgba(255,115,20,${0.78 * a / most})`;
      pen.fillRect(i % cells * w, Math.floor(i / cells) * w, w, w);
    });
    if (views.queries.length < side * side) {
      pen.fillStyle = "rgba(20,90,140,0.9)";
      for (const q of views.queries) { pen.beginPath(); pen.arc((q % side + 0.5) * p, (Math.floor(q / side) + 0.5) * p, 3, 0, 7); pen.fill(); }
    } else {
      pen.strokeStyle = "rgba(128,128,128,0.35)"; pen.lineWidth = 1;
      for (let i = 1; i < side; i++) { pen.beginPath(); pen.moveTo(i * p, 0); pen.lineTo(i * p, size); pen.moveTo(0, i * p); pen.lineTo(size, i * p); pen.stroke(); }
    }
    pen.strokeStyle = "#fff"; pen.lineWidth = 5; const x = state.query % side * p, y = Math.floor(state.query / side) * p;
    pen.strokeRect(x + 1.5, y + 1.5, p - 3, p - 3);
    pen.strokeStyle = "#14507a"; pen.lineWidth = 2.5; pen.strokeRect(x + 1.5, y + 1.5, p - 3, p - 3);
  });
}
byId("look").onclick = event => {
  const at = z => Math.min(side - 1, Math.max(0, Math.floor(z / 400 * side)));
  state.query = at(event.offsetY) * side + at(event.offsetX);
  drawLook();
};
byId("look").onkeydown = event => {
  const step = {ArrowUp: -side, ArrowDown: side, ArrowLeft: -1, ArrowRight: 1}[event.key];
  if (step && views.queries.includes(state.query + step)) { state.query += step; event.preventDefault(); drawLook(); }
};
function drawGrid(view, slot) {
  const size = cellOf(H, L, 590, 620, 112, 22), left = 46, top = 22, gap = size > 40 ? 6 : 3;
  const canvas = byId("grid"), pen = sharp(canvas, left + H * (size + gap), top + L * (size + gap));
  pen.fillStyle = "#5d6b7a"; pen.textBaseline = "middle"; pen.textAlign = "center";
  for (let h = 0; h < H; h++) pen.fillText(size > 40 ? "head " + h : h, left + h * (size + gap) + size / 2, 9);
  for (let l = 0; l < L; l++) {
    pen.fillStyle = "#5d6b7a"; pen.textAlign = "right"; pen.fillText(size > 40 ? "layer " + l : l, left - 5, top + l * (size + gap) + size / 2);
    for (let h = 0; h < H; h++) {
      const weights = weightsOf(view, l, h, slot), most = Math.max(...weights, 1e-9), w = size / cells;
      const x = left + h * (size + gap), y = top + l * (size + gap);
      weights.forEach((a, i) => { pen.fillStyle = orange(a / most); pen.fillRect(x + i % cells * w, y + Math.floor(i / cells) * w, w + 0.3, w + 0.3); });
      const chosen = l === state.layer && h === state.head;
      pen.strokeStyle = chosen ? "#14507a" : "#d5d0c8"; pen.lineWidth = chosen ? 3 : 1; pen.strokeRect(x, y, size, size);
    }
  }
  const at = (x, y) => [Math.floor((y - top) / (size + gap)), Math.floor((x - left) / (size + gap))];
  const inside = (l, h) => l >= 0 && h >= 0 && l < L && h < H;
  tell(canvas, (x, y) => { const [l, h] = at(x, y); return inside(l, h) ? describe(state.half, state.t + 1, l, h) : ""; });
  canvas.style.cursor = "pointer";
  canvas.onclick = event => { const [l, h] = at(event.offsetX, event.offsetY); if (inside(l, h)) { state.layer = l; state.head = h; drawLook(); drawMaps(); } };
}
function read(weights) {
  const patch = i => `row ${Math.floor(i / side)}, column ${i % side}`;
  const role = report.roles[state.half][state.t + 1][state.layer][state.head];
  if (role === "cut") return `Layer ${state.layer} has no head ${state.head}: it was cut out, and the picture shows nothing of it.`;
  const best = weights.indexOf(Math.max(...weights)), each = side / cells;
  const place = each === 1 ? `the patch at ${patch(best)}` : `the ${each} × ${each} patches from row ${Math.floor(best / cells) * each}, column ${best % cells * each}`;
  return `Layer ${state.layer}, head ${state.head}, at this timestep ${role === "between" ? "between local and global" : role + " on average"}. The patch at ${patch(state.query)} ` +
    `gives ${percent(weights[best])} of its attention to ${each === 1 && best === state.query ? "itself, most of all" : place}.`;
}

/* ---- what each head does ---- */
function describe(half, t, l, h) {
  const lines = [`layer ${l}, head ${h}: ${report.roles[half][t][l][h]}`];
  if (!there(l, h)) return lines[0];
  for (const [name, text] of Object.entries(MEASURES)) {
    if (!report.heads[name]) continue;
    const value = report.heads[name][half][t][l][h];
    const told = name === "distance" ? `${number(value)} patches (uniform ${number(report.uniform.distance)})` : name === "entropy" ? number(value) + " nats" : percent(value);
    lines.push(name === "same_segment" ? `${text} ${told} (by chance ${percent(report.heads.same_segment_chance[half][t][l][h])})` : `${text} ${told}`);
  }
  if (report.widest_gate) lines.push("widest gate " + number(report.widest_gate[l][h]));
  return lines.join("\n");
}
const present = report.roles[0][0].flat().filter(role => role !== "cut").length;
function drawMaps() {
  const known = Object.keys(MEASURES).filter(name => report.heads[name]).map(name => [name, MEASURES[name]]);
  if (report.widest_gate) known.push(["widest_gate", "widest gate"]);
  byId("map-controls").replaceChildren(
    choice("show", [["roles", "role"], ...known], "measure", drawMaps),
    choice("label", report.halves.map((name, i) => [i, name === "conditional" ? "given" : "none"]), "mapHalf", drawMaps));
  const roles = state.measure === "roles", gate = state.measure === "widest_gate";
  const values = roles ? report.roles[state.mapHalf] : gate ? [report.widest_gate] : report.heads[state.measure][state.mapHalf];
  const high = roles ? 1 : Math.max(...flat(values), 1e-9);
  byId("map-legend").replaceChildren(...(roles ? report.rules : []).map(([role]) =>
    make("li", {}, make("i", {style: "background:" + ROLE_COLOURS[role]}), `${role} (${flat(values[0]).filter(r => r === role).length} of ${role === "cut" ? L * H : present})`)));
  if (gate) byId("map-legend").replaceChildren(make("li", {}, `${values[0].flatMap((row, l) => row.filter((x, h) => x === 0 && there(l, h))).length} of ${present} heads stayed shut: exactly 0 throughout.`));
  const cell = cellOf(H, L, Math.max(1080 / values.length - 76, 90), 420, 40);
  byId("maps").replaceChildren(...values.map((map, t) => heat(map, {
    title: gate ? "over all timesteps" : t ? "t = " + report.timesteps[t - 1] : "mean over timesteps", cell: [cell, cell],
    xs: numbers(H), ys: numbers(L), xLabel: "head", yLabel: "layer",
    colour: value => roles ? ROLE_COLOURS[value] : blue(value / high),
    scale: roles || t ? null : [0, high, x => blue(x / high)],
    marked: (l, h) => l === state.layer && h === state.head,
    told: (l, h) => describe(state.mapHalf, t, l, h),
    click: (l, h) => { state.layer = l; state.head = h; if (t && viewAt(state.image, state.half, t - 1)) state.t = t - 1; drawLook(); drawMaps(); },
  })));
}

/* ---- what the condition does ---- */
function drawConditions() {
  const m = report.modulation, parts = ["attention_gate", "attention_scale", "attention_shift", "mlp_gate", "mlp_scale", "mlp_shift"];
  const told = name => name.replace("mlp", "MLP").replace("_", " ");
  byId("condition-controls").replaceChildren(choice("label", [[0, "mean"], ...m.labels.map((name, i) => [i + 1, name])].slice(0, 25), "label", drawConditions));
  const mean = rows => rows[0].map((_, l) => rows.reduce((sum, row) => sum + row[l], 0) / rows.length);
  const transposed = rows => rows[0].map((_, l) => rows.map(row => row[l]));
  const w = Math.max(6, Math.floor(290 / m.timesteps.length)), h = Math.max(9, Math.min(30, Math.floor(300 / L)));
  byId("modulation").replaceChildren(...parts.map(part => {
    const values = transposed(m.size[part].map(labels => state.label ? labels[state.label - 1] : mean(labels)));
    const high = Math.max(...flat(m.size[part]), 1e-9);
    return heat(values, {title: told(part), cell: [w, h], xs: m.timesteps.map(String), ys: numbers(L), xLabel: "timestep", yLabel: "layer",
      colour: x => blue(x / high), scale: [0, high, x => blue(x / high)], told: (l, i) => `${told(part)}\nlayer ${l}, t = ${m.timesteps[i]}: ${number(values[l][i])}`});
  }));
  byId("branch-controls").replaceChildren(choice("label", report.halves.map((name, i) => [i, name === "conditional" ? "given" : "none"]), "branchHalf", drawConditions));
  const names = {attention_survives: "attention survives", mlp_survives: "MLP survives", attention_share: "attention, share", mlp_share: "MLP, share"};
  const wide = Math.max(18, Math.min(48, Math.floor(200 / report.timesteps.length)));
  byId("branches").replaceChildren(...Object.entries(names).map(([name, title]) => {
    const values = transposed(report.branches[name][state.branchHalf]), high = Math.max(...flat(report.branches[name]), 1e-9);
    return heat(values, {title, cell: [wide, h], xs: report.timesteps.map(String), ys: numbers(L), xLabel: "timestep", yLabel: "layer",
      colour: x => blue(x / high), scale: [0, high, x => blue(x / high)], told: (l, i) => `${title}\nlayer ${l}, t = ${report.timesteps[i]}: ${number(values[l][i])}`});
  }));
  byId("label-controls").replaceChildren(choice("show", parts.map(part => [part, told(part)]), "part", drawConditions));
  const high = Math.max(...flat(m.size[state.part]), 1e-9), cell = Math.max(10, Math.min(34, Math.floor(280 / m.labels.length)));
  const chosen = [...new Set([0, 0.25, 0.5, 0.75, 1].map(f => Math.round(f * (m.timesteps.length - 1))))];
  byId("by-label").replaceChildren(...chosen.map((i, first) => heat(transposed(m.size[state.part][i]), {
    title: "t = " + m.timesteps[i], cell: [cell, h], xs: m.labels, ys: numbers(L), xLabel: "label", yLabel: "layer",
    colour: x => blue(x / high), scale: first ? null : [0, high, x => blue(x / high)],
    told: (l, y) => `${told(state.part)}, t = ${m.timesteps[i]}\nlayer ${l}, label ${m.labels[y]}: ${number(m.size[state.part][i][y][l])}`})));
}

/* ---- which heads matter ---- */
function drawImportance() {
  const found = report.importance;
  byId("importance-section").hidden = !found;
  if (!found) return;
  const t = state.importanceT, loss = found.loss[t];
  byId("importance-controls").replaceChildren(choice("timestep", [[0, "mean"], ...report.timesteps.map((x, i) => [i + 1, String(x)])], "importanceT", drawImportance));
  const rows = [];
  for (let l = 0; l < L; l++) for (let h = 0; h < H; h++) if (there(l, h)) rows.push({l, h, change: found.change[t][l][h], error: found.error[t][l][h]});
  rows.sort((a, b) => b.change - a.change);
  const most = Math.max(...rows.map(r => Math.abs(r.change)), 1e-12), shown = state.all ? rows : rows.slice(0, 24);
  const header = make("tr", {}, ...["layer", "head", "role", "loss it adds when removed", "", "% of the loss", "± standard error"].map((text, i) => make("th", {class: i < 2 || i > 4 ? "number" : ""}, text)));
  byId("importance").replaceChildren(header, ...shown.map(r => {
    const role = report.roles[0][t][r.l][r.h];
    return make("tr", {style: "cursor:pointer", onclick: () => { state.layer = r.l; state.head = r.h; drawLook(); drawMaps(); }},
      make("td", {class: "number"}, String(r.l)), make("td", {class: "number"}, String(r.h)),
      make("td", {}, make("i", {style: `display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px;background:${ROLE_COLOURS[role]}`}), role),
      make("td", {style: "width:300px"}, make("div", {class: r.change < 0 ? "bar less" : "bar", style: `width:${Math.max(1, 300 * Math.abs(r.change) / most)}px`})),
      make("td", {class: "number"}, r.change.toPrecision(3)), make("td", {class: "number"}, (100 * r.change / loss).toFixed(2) + "%"),
      make("td", {class: "number"}, (100 * r.error / loss).toFixed(2) + "%"));
  }));
  byId("more").hidden = state.all || rows.length <= shown.length;
  byId("more").textContent = `Show all ${rows.length}`;
  byId("more").onclick = () => { state.all = true; drawImportance(); };
  byId("importance-intro").textContent = `${report.about.ablation} The whole network's loss is ${loss.toPrecision(4)}` + (t ? ` at t = ${report.timesteps[t - 1]}.` : ", the mean over the timesteps.") + " Grey bars are heads without which the loss is lower.";
}

/* ---- the rest ---- */
byId("origin").textContent = `${report.about.weights}. ${report.about.data}`;
byId("facts").replaceChildren(...[net.heads_left.length ? [net.heads_left.join(", "), "heads of the layers"] : [`${L} × ${H}`, "layers × heads"], [`${side} × ${side}`, "patches"], [report.about.images.length, "images"],
  [report.timesteps.join(", "), "timesteps, of 0 (clean) to " + (report.about.steps - 1)], [report.halves.length === 2 ? "given and none" : "given", "label"], [net.attention, "attention"]]
  .map(([value, text]) => make("li", {}, make("b", {}, String(value)), make("span", {}, text))));
byId("roles-intro").textContent = `A role is measured, not guessed: it follows from three means over ${report.about.images.length} images and all their patches. Point at a head for its numbers, click it to see it above.`;
byId("rules").replaceChildren(...report.rules.flatMap(([role, rule]) => [make("dt", {}, make("i", {style: `display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;background:${ROLE_COLOURS[role]}`}), role), make("dd", {}, rule)]));
byId("notes").replaceChildren(...Object.entries(report.about.notes).flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]));
function fromHash() {
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) if (name in state && !isNaN(value)) state[name] = Number(value);
  state.layer = Math.min(Math.max(state.layer, 0), L - 1); state.head = Math.min(Math.max(state.head, 0), H - 1);
  if (!viewAt(state.image, state.half, state.t)) Object.assign(state, (v => ({image: v.image, half: v.half, t: v.timestep}))(views.items[0]));
  drawLook(); drawMaps();
}
addEventListener("hashchange", fromHash);
fromHash(); drawConditions(); drawImportance();
