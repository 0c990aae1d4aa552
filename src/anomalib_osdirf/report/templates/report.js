// Copyright (C) 2026 The anomalib-osdirf authors
// SPDX-License-Identifier: Apache-2.0
// Names of files, defect types and models come from users: they reach the page as text only, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const PER_PAGE = 24;
const OUTCOMES = {
  all: ["All", ""],
  missed: ["Missed", "✗ missed"],
  "false-alarm": ["False alarms", "! false alarm"],
  found: ["Found", "✓ found"],
  correct: ["Correct", "○ correct"],
  unlabelled: ["Unlabelled", "? unlabelled"],
};

const state = { run: 0, outcome: "all", type: -1, order: "section", common: false, search: "", page: 0, open: -1, other: 1, versus: null };
const thresholds = data.runs.map((run) => run.threshold ?? 0);
const run = () => data.runs[state.run];
const threshold = () => thresholds[state.run];
const element = (tag, attributes = {}, ...children) => {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
};

// ---------------------------------------------------------------- outcomes and counts

const outcome = (from, index, limit) => {
  const label = from.labels[index], score = from.scores[index];
  if (label < 0 || score === null) return "unlabelled";
  if (label === 1) return score > limit ? "found" : "missed";
  return score > limit ? "false-alarm" : "correct";
};

const count = () => {
  const counts = { missed: 0, "false-alarm": 0, found: 0, correct: 0, unlabelled: 0 };
  run().labels.forEach((_, index) => { counts[outcome(run(), index, threshold())] += 1; });
  return counts;
};

const wilson = (hits, total) => {
  const z = 1.959964, share = hits / total, spread = z * z / total;
  const middle = (share + spread / 2) / (1 + spread);
  const half = z / (1 + spread) * Math.sqrt(share * (1 - share) / total + spread / total / 4);
  return [Math.max(0, middle - half), Math.min(1, middle + half)];
};

const percent = (value) => `${(100 * value).toFixed(1)} %`;

// The share of normal images with such a score or a higher one.
const pValue = (rate, value) => (rate ** (Math.max(0, value) / Math.max(1e-15, 1 - value))).toPrecision(2);

// As many digits as it takes to tell a value from the threshold.
const digits = (value, limit) => {
  let places = 3;
  while (places < 9 && value !== limit && value.toFixed(places) === limit.toFixed(places)) places += 1;
  return value.toFixed(places);
};

// The model's own score, which a normalised one stands for.
const rawScore = (from, value) => {
  if (from.scale) return (value - from.scale[1]) / from.scale[0];
  if (!from.knots) return value;
  const knots = from.knots, wanted = value / (1 - value);
  const index = Math.max(0, knots.findLastIndex(([exponent], at) => at < knots.length - 1 && exponent <= wanted));
  const [[exponent, place], [next, nextPlace]] = knots.slice(index, index + 2);
  const width = (nextPlace - place) / (next - exponent);
  return wanted < exponent ? place - (exponent / wanted - 1) * exponent * width : place + (wanted - exponent) * width;
};

const setCount = (id, hits, total) => {
  const range = total ? wilson(hits, total).map((end) => (100 * end).toFixed(1)).join(" to ") : "";
  find(id).replaceChildren(total ? `${hits} of ${total}` : "n/a",
    element("small", { textContent: total ? `${percent(hits / total)} (${range})` : "" }));
};

const verdict = (counts, anomalous, normal) => {
  const alarms = counts["false-alarm"];
  const parts = [
    anomalous && `${counts.found} of ${anomalous} ${anomalous === 1 ? "defect" : "defects"} found`,
    normal && `${alarms || "no"} ${alarms === 1 ? "false alarm" : "false alarms"} in ${normal} good ${normal === 1 ? "part" : "parts"}`,
  ];
  const sentence = `${parts.filter(Boolean).join(", ")}, at this threshold.`;
  return sentence[0].toUpperCase() + sentence.slice(1);
};

const showCounts = () => {
  const counts = count();
  const anomalous = counts.found + counts.missed, normal = counts.correct + counts["false-alarm"];
  find("verdict").textContent = verdict(counts, anomalous, normal);
  setCount("found-count", counts.found, anomalous);
  setCount("missed-count", counts.missed, anomalous);
  setCount("false-alarm-count", counts["false-alarm"], normal);
  const { auroc, rate, model } = run(), raw = rawScore(run(), threshold()).toPrecision(9);
  find("auroc").replaceChildren(auroc ? auroc[0].toFixed(3) : "n/a",
    element("small", { textContent: auroc ? `${auroc[1].toFixed(3)} to ${auroc[2].toFixed(3)}` : "" }));
  find("value").textContent = `Threshold ${digits(threshold(), run().threshold ?? 0)}${rate ? `, p-value ${pValue(rate, threshold())}` : ""}`;
  find("raw").textContent = raw;
  find("take-command").hidden = !model;
  find("command").textContent = `python -m anomalib_osdirf threshold ${quoted(model ?? "")} ${raw}`;
  const json = JSON.stringify({
    model: run().label, file: model, image_threshold: Number(raw), normalised_threshold: threshold(),
    p_value: rate ? Number(pValue(rate, threshold())) : null,
    defects: anomalous, found: counts.found, good_parts: normal, false_alarms: counts["false-alarm"],
  }, null, 1);
  find("json").textContent = json.replace(/\n */g, " ");
  find("save").href = `data:application/json;charset=utf-8,${encodeURIComponent(json)}\n`;
  return { counts, anomalous, normal };
};

const quoted = (word) => /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", `'"'"'`)}'`;

// ---------------------------------------------------------------- charts

const CONFIG = {
  background: null, font: "system-ui, sans-serif",
  view: { stroke: null },
  axis: { labelColor: "var(--soft)", titleColor: "var(--ink)", domainColor: "var(--soft)", tickColor: "var(--soft)", gridColor: "var(--line)", titleFontWeight: 500, labelFontSize: 12, titleFontSize: 13 },
  legend: { labelColor: "var(--ink)", titleColor: "var(--ink)", orient: "top", labelFontSize: 13, labelLimit: 420, symbolStrokeWidth: 3, symbolOpacity: 1, columns: { expr: "width > 420 ? 3 : 1" } },
};
const SERIES = data.runs.map((_, index) => `var(--series-${index % 6})`);
const DASHES = data.runs.map((_, index) => [[1, 0], [7, 3], [2, 2], [9, 3, 2, 3]][index % 4]);
const byRun = {
  color: { field: "run", type: "nominal", scale: { domain: data.runs.map((one) => one.label), range: SERIES }, legend: data.runs.length > 1 ? { title: null } : null },
  strokeDash: { field: "run", type: "nominal", scale: { domain: data.runs.map((one) => one.label), range: DASHES }, legend: data.runs.length > 1 ? { title: null } : null },
};
const draw = async (id, spec, patch) => {
  const options = { mode: "vega-lite", renderer: "svg", actions: false, config: CONFIG, tooltip: false, patch };
  const { view } = await vegaEmbed(`#${id}`, { width: "container", autosize: { type: "fit-x", contains: "padding" }, ...spec }, options);
  return view;
};

const scored = () => run().scores.flatMap((score, index) =>
  score === null || run().labels[index] < 0 ? [] : [{ score, label: run().labels[index] ? "anomalous" : "normal" }]);

// Scores are drawn on an axis that is stretched around the model's threshold by the narrower group's spread, so that
// both groups are seen; it is linear there, and logarithmic far away.
let axis = {};
const setAxis = () => {
  const centre = run().threshold ?? 0;
  const away = ["normal", "anomalous"].map((label) => scored().filter((item) => item.label === label)
    .map((item) => Math.abs(item.score - centre)).sort((a, b) => a - b));
  const spreads = away.filter((part) => part.length).map((part) => part[part.length >> 1]).filter((spread) => spread > 0);
  const unit = spreads.length ? Math.min(...spreads) : 1;
  axis = { centre, unit, place: (score) => Math.asinh((score - centre) / unit), score: (place) => centre + unit * Math.sinh(place) };
  const places = [0, ...scored().map((item) => axis.place(item.score))];
  const low = places.reduce((a, b) => Math.min(a, b)), high = places.reduce((a, b) => Math.max(a, b));
  const margin = 0.04 * (high - low || 1);
  axis.domain = [low - margin, high + margin];
  const ends = axis.domain.map(axis.score);
  const round = (score) => Number(score.toPrecision(Math.abs(score - centre) < 0.1 * Math.abs(score) ? 3 : 2));
  axis.ticks = [...new Set(Array.from({ length: 8 }, (_, index) => round(axis.score(low + (high - low) * index / 7))))]
    .filter((score) => score >= ends[0] && score <= ends[1]).map(axis.place);
};

// A bin's edge is at the threshold, and a score on it lies below, as it is called normal.
const bars = () => {
  const step = (axis.domain[1] - axis.domain[0]) / 48, edge = axis.place(threshold()), heights = new Map();
  for (const { score, label } of scored()) {
    const bin = score > threshold() ? Math.max(1, Math.ceil((axis.place(score) - edge) / step)) : Math.min(0, Math.ceil((axis.place(score) - edge) / step));
    const key = `${bin} ${label}`;
    heights.set(key, (heights.get(key) ?? 0) + 1);
  }
  return [...heights].map(([key, images]) => {
    const [bin, label] = key.split(" ");
    return { from: Math.max(axis.domain[0], edge + (bin - 1) * step), to: Math.min(axis.domain[1], edge + bin * step), label, height: label === "normal" ? images : -images };
  });
};

let histogram, roc, precision;

const drawHistogram = async () => {
  const { domain, centre, unit, ticks } = axis;
  const x = { type: "quantitative", scale: { domain, nice: false, zero: false } };
  const label = `format(${centre} + ${unit} * (exp(datum.value) - exp(-datum.value)) / 2, '.3~g')`;
  histogram = await draw("histogram", {
    height: 230,
    params: [{ name: "threshold", value: axis.place(threshold()) }],
    layer: [
      {
        data: { name: "bars", values: bars() },
        mark: { type: "bar", binSpacing: 1 },
        encoding: {
          x: { ...x, field: "from", bin: "binned", title: "Score, spread out around the threshold", axis: { values: ticks, labelExpr: label } }, x2: { field: "to" },
          y: { field: "height", type: "quantitative", title: "Images", axis: { labelExpr: "format(abs(datum.value), 'd')", tickMinStep: 1, tickCount: 6 } },
          color: { field: "label", type: "nominal", scale: { domain: ["normal", "anomalous"], range: ["var(--normal)", "var(--anomalous)"] }, legend: { title: null, labelExpr: "datum.label === 'normal' ? 'normal, upwards' : 'anomalous, downwards'" } },
        },
      },
      { data: { values: [{}] }, mark: { type: "rule", color: "var(--line)" }, encoding: { y: { datum: 0, type: "quantitative" } } },
      { data: { values: [{}] }, mark: { type: "rule", color: "var(--ink)", strokeWidth: 3, cursor: "ew-resize" }, encoding: { x: { ...x, datum: { expr: "threshold" } } } },
    ],
  }, (compiled) => {
    const signal = compiled.signals.find((one) => one.name === "threshold");
    const update = "clamp(invert('x', x()), domain('x')[0], domain('x')[1])";
    signal.on = [
      { events: "pointerdown", update },
      { events: "[pointerdown, window:pointerup] > window:pointermove!", update },
    ];
    return compiled;
  });
  histogram.addSignalListener("threshold", (_, place) => { if (place !== axis.place(threshold())) setThreshold(rounded(place)); });
};

const drawCurve = async (id, curve, x, y, point) => draw(id, {
  height: 210,
  params: [{ name: "atX", value: point[0] }, { name: "atY", value: point[1] }],
  layer: [
    {
      data: { values: data.runs.flatMap((one) => one.curves[curve].map(([a, b], index) => ({ a, b, index, run: one.label }))) },
      mark: { type: "line", interpolate: curve === "roc" ? "linear" : "step-before", strokeWidth: 2.5, clip: true },
      encoding: {
        x: { field: "a", type: "quantitative", title: x, scale: { domain: [0, 1] } },
        y: { field: "b", type: "quantitative", title: y, scale: { domain: [0, 1.005], nice: false }, axis: { values: [0, 0.2, 0.4, 0.6, 0.8, 1] } },
        order: { field: "index", type: "quantitative" }, ...byRun,
      },
    },
    { data: { values: [{}] }, mark: { type: "point", filled: true, size: 140, color: "var(--ink)", opacity: 1 }, encoding: { x: { datum: { expr: "atX" }, type: "quantitative" }, y: { datum: { expr: "atY" }, type: "quantitative" } } },
  ],
});

const operatingPoints = ({ counts, anomalous, normal }) => {
  const recall = anomalous ? counts.found / anomalous : 0;
  const fired = counts.found + counts["false-alarm"];
  return { roc: [normal ? counts["false-alarm"] / normal : 0, recall], pr: [recall, fired ? counts.found / fired : 1] };
};

const moveTo = (view, point) => view && view.signal("atX", point[0]).signal("atY", point[1]).runAsync();

const SMOOTHED = 10; // values at either side; the page has at most 600

const drawLosses = async () => {
  const values = data.runs.flatMap((one) => one.losses.map(([step, loss]) => ({ step, loss, run: one.label })));
  if (!values.length) return;
  find("losses").hidden = false;
  const scale = values.every((one) => one.loss > 0) ? { type: "log", nice: false } : { zero: false };
  const y = { type: "quantitative", title: "Loss, and its running mean", scale, axis: { tickCount: 5 } };
  await draw("losses", {
    height: 220, data: { values },
    transform: [{ window: [{ op: "mean", field: "loss", as: "smooth" }], frame: [-SMOOTHED, SMOOTHED], groupby: ["run"], sort: [{ field: "step" }] }],
    encoding: {
      x: { field: "step", type: "quantitative", title: "Training step", scale: { nice: false } },
      ...byRun,
    },
    layer: [
      { mark: { type: "line", strokeWidth: 1, opacity: 0.3 }, encoding: { y: { ...y, field: "loss" } } },
      { mark: { type: "line", strokeWidth: 2.5 }, encoding: { y: { ...y, field: "smooth" } } },
    ],
  });
};

// ---------------------------------------------------------------- threshold

// Of a place on the axis, a score of no more digits than are shown.
const rounded = (place) => Number(axis.score(place).toPrecision(6));

const setThreshold = (value) => {
  thresholds[state.run] = value;
  const place = axis.place(value);
  find("slider").value = place;
  if (histogram && histogram.signal("threshold") !== place) histogram.signal("threshold", place).runAsync();
  const points = operatingPoints(showCounts());
  moveTo(roc, points.roc);
  moveTo(precision, points.pr);
  scheduleRest();
};

// Pictures and bars follow when the line rests.
let waiting = 0;
const scheduleRest = () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => { histogram?.data("bars", bars()).runAsync(); showTelling(); showDifferences(); showGallery(); }, 120);
};

const showThreshold = async () => {
  const any = scored().length > 0;
  find("overview-content").hidden = !any;
  find("overview-none").hidden = any;
  const curves = any && run().curves.roc.length > 0;
  if (find("curves")) find("curves").hidden = !curves;
  if (!any) return;
  setAxis();
  const slider = find("slider");
  [slider.min, slider.max, slider.step] = [...axis.domain, (axis.domain[1] - axis.domain[0]) / 1000];
  slider.value = axis.place(threshold());
  find("origin").textContent = `The line starts at ${(run().threshold ?? 0).toFixed(3)}: ${run().origin}. Drag it: images with a score above it are called anomalous. In brackets: 95 % intervals.`;
  const points = operatingPoints(showCounts());
  showTelling();
  await drawHistogram();
  if (curves) {
    roc = await drawCurve("roc", "roc", "False-alarm rate", "Detection rate", points.roc);
    precision = await drawCurve("pr", "pr", "Recall", "Precision", points.pr);
  }
};

// ---------------------------------------------------------------- gallery

const score = (from, index, limit) => from.scores[index] === null ? "no score"
  : digits(from.scores[index], limit) + (from.rate ? `, p-value ${pValue(from.rate, from.scores[index])}` : "");

const FEW = 6;
const SECTIONS = ["Missed", "False alarms", "Closest calls", "Best catches", "All others"];

// Section of each image, and its place in there: the worst mistakes, the closest calls and the highest scores first.
const sections = () => {
  const { scores } = run(), limit = threshold();
  const of = (wanted) => scores.map((_, index) => index).filter((index) => wanted.includes(outcome(run(), index, limit)));
  const far = (index) => Math.abs(scores[index] - limit);
  const close = of(["found", "correct"]).sort((a, b) => far(a) - far(b)).slice(0, FEW);
  const rest = of(["found"]).filter((index) => !close.includes(index)).sort((a, b) => scores[b] - scores[a]);
  const parts = [
    of(["missed"]).sort((a, b) => far(b) - far(a)), of(["false-alarm"]).sort((a, b) => far(b) - far(a)), close, rest.slice(0, FEW),
    [...rest.slice(FEW), ...of(["correct"]).filter((index) => !close.includes(index)).sort((a, b) => scores[b] - scores[a]), ...of(["unlabelled"])],
  ];
  const found = new Map();
  parts.forEach((part, section) => part.forEach((index) => found.set(index, [section, found.size])));
  return found;
};

const ordered = () => {
  const { scores, names, type } = run();
  const limit = threshold(), text = state.search.toLowerCase(), section = sections();
  const value = (index) => scores[index] ?? -Infinity;
  const orders = {
    section: (a, b) => section.get(a)[1] - section.get(b)[1], high: (a, b) => value(b) - value(a), low: (a, b) => value(a) - value(b),
    name: (a, b) => names[a].localeCompare(names[b], undefined, { numeric: true }),
  };
  return names.map((_, index) => index)
    .filter((index) => (!state.versus || difference(index) === state.versus) && (state.outcome === "all" || outcome(run(), index, limit) === state.outcome)
      && (state.type < 0 || type[index] === state.type) && (!text || names[index].toLowerCase().includes(text)))
    .sort((a, b) => orders[state.order](a, b) || a - b);
};

const pane = (from, index, title, layers) => {
  const [width, height] = from.sizes[index];
  const shown = layers.filter((one) => one !== null);
  const box = element("span", { className: shown.length ? "pane" : "pane empty" }, ...shown);
  box.style.aspectRatio = width && height ? `${width} / ${height}` : "1";
  return element("span", {}, box, element("span", { className: "name", textContent: title }));
};

const image = (number) => number === null ? null : element("img", { src: data.pictures[number], alt: "" });

// Grey pictures of maps are coloured here, over their own range or the common one.
const heatMap = (from, [, map, low, high]) => {
  if (map === null) return null;
  const canvas = element("canvas"), source = image(map);
  const [bottom, top] = state.common ? from.range : [low, high];
  source.decode().then(() => {
    [canvas.width, canvas.height] = [source.naturalWidth, source.naturalHeight];
    const context = canvas.getContext("2d");
    context.drawImage(source, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height);
    for (let at = 0; at < pixels.data.length; at += 4) {
      const share = (low + pixels.data[at] / 255 * (high - low) - bottom) / Math.max(1e-12, top - bottom);
      pixels.data.set(data.colours[Math.max(0, Math.min(255, Math.round(255 * share)))], at);
    }
    context.putImageData(pixels, 0, 0);
  });
  return canvas;
};

const outlines = (paths) => {
  const name = "http://www.w3.org/2000/svg", drawing = document.createElementNS(name, "svg");
  drawing.setAttribute("viewBox", "0 0 255 255");
  drawing.setAttribute("preserveAspectRatio", "none");
  for (const [line, path] of Object.entries(paths)) {
    for (const part of path ? ["casing", line] : []) {
      const line = document.createElementNS(name, "path");
      line.setAttribute("d", path);
      line.setAttribute("class", part);
      drawing.append(line);
    }
  }
  return drawing;
};

const panes = (from, index) => {
  const shown = from.shown[index];
  if (!shown) return null;
  const [picture, map, , , truth, limit] = shown;
  return element("span", { className: "panes" },
    pane(from, index, "image", [image(picture)]),
    pane(from, index, "outlines", [image(picture), outlines({ truth, limit })]),
    pane(from, index, map === null ? "no map" : "map", [heatMap(from, shown), map === null ? null : outlines({ truth, limit })]));
};

const caption = (from, index, limit) => element("span", { className: "caption" },
  element("span", { textContent: from.names[index] }),
  element("span", {}, element("span", { className: "badge", textContent: OUTCOMES[outcome(from, index, limit)][1] }), ` ${score(from, index, limit)}`));

let list = [];

const card = (index, open) => {
  const made = element("button", { type: "button", className: `card ${outcome(run(), index, threshold())}` });
  made.append(panes(run(), index) ?? "", caption(run(), index, threshold()));
  if (state.versus) {
    const [from, same, limit] = [other(), sameIn(state.other, index), thresholds[state.other]];
    made.append(element("span", { className: `second ${outcome(from, same, limit)}` },
      element("span", { className: "name", textContent: from.label }), panes(from, same) ?? "", caption(from, same, limit)));
  }
  made.addEventListener("click", open);
  return made;
};

// The worst miss and false alarm, or else the closest calls, and the best catch.
const showTelling = () => {
  const { scores } = run(), limit = threshold(), indices = scores.map((_, index) => index);
  const best = (name, value) => indices.filter((index) => outcome(run(), index, limit) === name).sort((a, b) => value(b) - value(a));
  const far = (index) => Math.abs(scores[index] - limit), close = (index) => -far(index);
  const caught = best("found", far);
  const told = [
    best("missed", far)[0] ?? caught.at(-1), best("false-alarm", far)[0] ?? best("correct", close)[0], caught[0],
  ].filter((index) => index !== undefined);
  find("telling").replaceChildren(...[...new Set(told)].map((index) => card(index, () => {
    showAll({ versus: null });
    enlarge(list.indexOf(index));
  })));
};

// Without filters but these.
const showAll = (changes) => {
  [find("defect-type").value, find("search").value] = [-1, ""];
  filter({ outcome: "all", type: -1, search: "", ...changes });
};

const showGallery = () => {
  list = ordered();
  const pages = Math.max(1, Math.ceil(list.length / PER_PAGE));
  state.page = Math.min(state.page, pages - 1);
  const counts = count();
  for (const button of find("outcomes").children) {
    const name = button.dataset.outcome, number = name === "all" ? run().names.length : counts[name];
    button.textContent = `${OUTCOMES[name][0]} (${number})`;
    button.setAttribute("aria-pressed", String(name === state.outcome));
    button.hidden = name === "unlabelled" && !number;
  }
  const without = list.filter((index) => !run().shown[index]).length;
  find("versus").hidden = !state.versus;
  find("versus").textContent = `✕ ${described(state.versus)}`;
  find("found").textContent = `${list.length} of ${run().names.length} images` + (without ? `; ${without} of them without pictures, to keep this page small` : "");
  find("page").textContent = `Page ${state.page + 1} of ${pages}`;
  find("previous").disabled = state.page === 0;
  find("next").disabled = state.page === pages - 1;
  find("pages").hidden = pages === 1;
  const section = sections(), items = [];
  let last = -1;
  list.slice(state.page * PER_PAGE, (state.page + 1) * PER_PAGE).forEach((index, place) => {
    const [own] = section.get(index);
    if (state.order === "section" && own !== last) items.push(element("li", { className: "section" }, element("h3", { textContent: SECTIONS[own] })));
    last = own;
    items.push(element("li", {}, card(index, () => enlarge(state.page * PER_PAGE + place))));
  });
  find("cards").replaceChildren(...items);
};

const turn = (pages) => { state.page += pages; showGallery(); find("gallery").scrollIntoView(); };

const filter = (changes) => { Object.assign(state, changes, { page: 0 }); showGallery(); };

// In a row of cards, as many as the window has room for.
find("cards").addEventListener("keydown", (event) => {
  const cards = [...find("cards").querySelectorAll(".card")], at = cards.indexOf(document.activeElement);
  const row = cards.filter((card) => card.offsetTop === cards[0].offsetTop).length;
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: row, ArrowUp: -row, Home: -at, End: cards.length - 1 - at };
  if (!(event.key in steps) || at < 0) return;
  event.preventDefault();
  cards[Math.max(0, Math.min(cards.length - 1, at + steps[event.key]))].focus();
});

// ---------------------------------------------------------------- differences between two runs

// Where each path is in a run.
const places = new Map();
const placesOf = (from) => {
  if (!places.has(from)) places.set(from, new Map(from.names.map((name, index) => [from.folder + name, index])));
  return places.get(from);
};

// The same image in another run, if that has it.
const sameIn = (number, index) => number === state.run ? index : placesOf(data.runs[number]).get(run().folder + run().names[index]);
const other = () => data.runs[state.other];
const ROWS = [["found", "defects found"], ["false-alarm", "false alarms"]];
const WHO = { both: () => "by both", this: () => `only by ${run().label}`, other: () => `only by ${other().label}`, neither: () => "by neither" };

// Which of the two runs calls an image anomalous: `found this`, for one.
const difference = (index) => {
  const same = sameIn(state.other, index), scored = (from, at) => from.labels[at] >= 0 && from.scores[at] !== null;
  if (same === undefined || !scored(run(), index) || !scored(other(), same)) return null;
  const mine = run().scores[index] > threshold(), theirs = other().scores[same] > thresholds[state.other];
  return `${ROWS[1 - run().labels[index]][0]} ${mine ? (theirs ? "both" : "this") : theirs ? "other" : "neither"}`;
};

const described = (versus) => {
  const [row, who] = (versus ?? "found both").split(" ");
  return `${Object.fromEntries(ROWS)[row]} ${WHO[who]()}`;
};

const showDifferences = () => {
  if (data.runs.length < 2) return;
  const counts = new Map();
  run().names.forEach((_, index) => { const key = difference(index); counts.set(key, (counts.get(key) ?? 0) + 1); });
  const compared = run().names.length - (counts.get(null) ?? 0);
  const left = run().names.length + other().names.length - 2 * compared;
  find("this-run").textContent = run().label;
  find("shared").textContent = !compared
    ? "No scored test image is in both runs, so there is nothing to compare: test both on the same images."
    : `${compared} test images are in both runs${left ? `, and ${left} are in one of them only, and not compared` : ""}. Each run is taken at its own threshold. A number shows its images.`;
  find("differing").hidden = !compared;
  const cell = (row, who) => {
    const key = `${row} ${who}`, made = element("button", { type: "button", textContent: counts.get(key) ?? 0, disabled: !counts.get(key) });
    made.dataset.versus = key;
    made.setAttribute("aria-label", `${made.textContent} ${described(key)}`);
    made.addEventListener("click", () => { showAll({ versus: key }); find("gallery").scrollIntoView(); });
    return element("td", {}, made);
  };
  const head = (scope, text) => element("th", { scope, textContent: text });
  find("differing").replaceChildren(element("table", {},
    element("thead", {}, element("tr", {}, head("col", ""), ...Object.values(WHO).map((text) => head("col", text())))),
    element("tbody", {}, ...ROWS.map(([row, name]) => element("tr", {}, head("row", name), ...Object.keys(WHO).map((who) => cell(row, who)))))));
};

// ---------------------------------------------------------------- enlarged image

const enlarge = (place) => {
  if (place < 0 || place >= list.length) return;
  state.open = place;
  const index = list[place], name = run().names[index];
  find("large-name").textContent = name;
  const content = find("large-content");
  content.replaceChildren();
  data.runs.forEach((other, number) => {
    const same = sameIn(number, index);
    if (same === undefined) return;
    const heading = element("p", { className: outcome(other, same, thresholds[number]) },
      element("span", { textContent: data.runs.length > 1 ? `${other.label}: ` : "" }),
      element("span", { className: "badge", textContent: OUTCOMES[outcome(other, same, thresholds[number])][1] }),
      ` score ${score(other, same, thresholds[number])}, threshold ${thresholds[number].toFixed(3)}, defect type ${other.types[other.type[same]] || "unknown"}`);
    content.append(heading, panes(other, same) ?? element("p", { className: "soft", textContent: "No pictures of this image in the page." }));
  });
  find("large-previous").disabled = place === 0;
  find("large-next").disabled = place === list.length - 1;
  if (!find("large").open) find("large").showModal();
};

find("large").addEventListener("keydown", (event) => {
  if (event.key === "ArrowRight") enlarge(state.open + 1);
  if (event.key === "ArrowLeft") enlarge(state.open - 1);
});
find("large").addEventListener("close", () => {
  // Back to the card of the image that was looked at last.
  state.page = Math.floor(state.open / PER_PAGE);
  showGallery();
  find("cards").querySelectorAll(".card")[state.open % PER_PAGE]?.focus();
});
find("large-previous").addEventListener("click", () => enlarge(state.open - 1));
find("large-next").addEventListener("click", () => enlarge(state.open + 1));
find("large-close").addEventListener("click", () => find("large").close());
find("large").addEventListener("click", (event) => { if (event.target === find("large")) find("large").close(); });

// ---------------------------------------------------------------- controls

for (const name of Object.keys(OUTCOMES)) {
  const button = element("button", { type: "button" });
  button.dataset.outcome = name;
  button.addEventListener("click", () => filter({ outcome: name }));
  find("outcomes").append(button);
}
find("slider").addEventListener("input", (event) => setThreshold(rounded(Number(event.target.value))));
find("reset").addEventListener("click", () => setThreshold(run().threshold ?? 0));
find("defect-type").addEventListener("change", (event) => filter({ type: Number(event.target.value) }));
find("common").addEventListener("change", (event) => { state.common = event.target.checked; showTelling(); showGallery(); });
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", () => {
    getSelection().selectAllChildren(find(button.dataset.copy));
    document.execCommand("copy"); // pages from files have no navigator.clipboard in all browsers
    button.textContent = "Copied";
  });
}
find("ramp").style.background = `linear-gradient(to right, ${[0, 64, 128, 191, 255].map((at) => `rgb(${data.colours[at]})`).join(", ")})`;
find("versus").addEventListener("click", () => filter({ versus: null }));
find("other")?.addEventListener("change", (event) => { state.other = Number(event.target.value); filter({ versus: null }); showDifferences(); });
find("order").addEventListener("change", (event) => filter({ order: event.target.value }));
find("search").addEventListener("input", (event) => filter({ search: event.target.value }));
find("previous").addEventListener("click", () => turn(-1));
find("next").addEventListener("click", () => turn(1));
find("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
for (const time of document.querySelectorAll("time")) {
  const date = new Date(time.dateTime);
  if (!Number.isNaN(date.getTime())) time.textContent = date.toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}
addEventListener("beforeprint", () => { for (const one of document.querySelectorAll("details")) one.open = true; });
find("run")?.addEventListener("change", (event) => { state.run = Number(event.target.value); showRun(); });

const showRun = async () => {
  state.type = -1;
  Object.assign(state, { page: 0, versus: null, other: state.other === state.run ? Number(!state.run) : state.other });
  find("other")?.replaceChildren(...data.runs.flatMap((one, index) => index === state.run ? [] : [element("option", { value: index, textContent: one.label })]));
  if (find("other")) find("other").value = state.other;
  showDifferences();
  find("defect-type").replaceChildren(element("option", { value: -1, textContent: "all defect types" }),
    ...run().types.map((type, index) => element("option", { value: index, textContent: type })));
  const any = run().names.length > 0;
  find("gallery-content").hidden = !any;
  find("gallery-none").hidden = any;
  if (any) showGallery();
  await showThreshold();
};

await showRun();
await drawLosses();
document.documentElement.dataset.ready = "true";
