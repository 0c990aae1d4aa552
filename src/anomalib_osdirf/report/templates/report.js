// Copyright (C) 2026 The anomalib-osdirf authors
// SPDX-License-Identifier: Apache-2.0
// Names of files, kinds and models come from users: they reach the page as text only, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const PER_PAGE = 24;
const OUTCOMES = {
  all: ["All", ""],
  missed: ["Missed", "✗ missed"],
  "false-alarm": ["False alarms", "! false alarm"],
  caught: ["Caught", "✓ caught"],
  passed: ["Rightly passed", "○ passed"],
  unlabelled: ["Unlabelled", "? unlabelled"],
};

const state = { run: 0, outcome: "all", kind: -1, order: "worst", search: "", page: 0, open: -1 };
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
  if (label === 1) return score > limit ? "caught" : "missed";
  return score > limit ? "false-alarm" : "passed";
};

const count = () => {
  const counts = { missed: 0, "false-alarm": 0, caught: 0, passed: 0, unlabelled: 0 };
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

const setRate = (id, hits, total) => {
  const target = find(id);
  if (!total) { target.textContent = "n/a"; return; }
  const [low, high] = wilson(hits, total);
  target.replaceChildren(percent(hits / total), element("small", { textContent: `${hits} of ${total} (${percent(low)} to ${percent(high)})` }));
};

const showCounts = () => {
  const counts = count();
  const anomalous = counts.caught + counts.missed, normal = counts.passed + counts["false-alarm"];
  find("caught").textContent = counts.caught;
  find("missed").textContent = counts.missed;
  find("false-alarms").textContent = counts["false-alarm"];
  find("passed").textContent = counts.passed;
  find("f1").textContent = anomalous ? (2 * counts.caught / (counts.caught + counts["false-alarm"] + anomalous)).toFixed(3) : "n/a";
  setRate("miss-rate", counts.missed, anomalous);
  setRate("false-alarm-rate", counts["false-alarm"], normal);
  const { scale, rate } = run();
  const raw = scale ? `, the model's own score ${((threshold() - scale[1]) / scale[0]).toPrecision(6)}`
    : rate ? `, p-value ${pValue(rate, threshold())}` : "";
  find("value").textContent = `Threshold ${threshold().toFixed(3)}${raw}`;
  return { counts, anomalous, normal };
};

// ---------------------------------------------------------------- charts

const CONFIG = {
  background: null, font: "system-ui, sans-serif",
  view: { stroke: null },
  axis: { labelColor: "var(--soft)", titleColor: "var(--ink)", domainColor: "var(--soft)", tickColor: "var(--soft)", gridColor: "var(--line)", titleFontWeight: 500, labelFontSize: 12, titleFontSize: 13 },
  legend: { labelColor: "var(--ink)", titleColor: "var(--ink)", orient: "top", labelFontSize: 13, labelLimit: 420, symbolStrokeWidth: 3, columns: { expr: "width > 600 ? 3 : 1" } },
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

const extent = () => {
  const scores = scored().map((item) => item.score);
  const low = Math.min(threshold(), scores.reduce((a, b) => Math.min(a, b), Infinity));
  const high = Math.max(threshold(), scores.reduce((a, b) => Math.max(a, b), -Infinity));
  const margin = 0.03 * (high - low || 1);
  return [low - margin, high + margin];
};

let histogram, roc, precision;

const drawHistogram = async (domain) => {
  const step = (domain[1] - domain[0]) / 48;
  const x = { type: "quantitative", scale: { domain, nice: false, zero: false } };
  const title = run().scale ? "Score, as anomalib normalises it, not clipped" : run().rate ? "Score (p-value = rate^(score / (1 - score)))" : "Score";
  histogram = await draw("histogram", {
    height: 240,
    params: [{ name: "threshold", value: threshold() }],
    layer: [
      {
        data: { values: scored() },
        transform: [
          { bin: { extent: domain, step }, field: "score", as: ["from", "to"] },
          { aggregate: [{ op: "count", as: "images" }], groupby: ["from", "to", "label"] },
          { calculate: "datum.label === 'normal' ? datum.images : -datum.images", as: "height" },
        ],
        mark: { type: "bar", binSpacing: 1 },
        encoding: {
          x: { ...x, field: "from", bin: "binned", title }, x2: { field: "to" },
          y: { field: "height", type: "quantitative", title: "Images", axis: { labelExpr: "format(abs(datum.value), 'd')", tickMinStep: 1 } },
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
  histogram.addSignalListener("threshold", (_, value) => { if (value !== threshold()) setThreshold(value); });
};

const drawCurve = async (id, kind, x, y, point) => draw(id, {
  height: 300,
  params: [{ name: "atX", value: point[0] }, { name: "atY", value: point[1] }],
  layer: [
    {
      data: { values: data.runs.flatMap((one) => one.curves[kind].map(([a, b], index) => ({ a, b, index, run: one.label }))) },
      mark: { type: "line", interpolate: kind === "roc" ? "linear" : "step-before", strokeWidth: 2.5, clip: true },
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
  const recall = anomalous ? counts.caught / anomalous : 0;
  const fired = counts.caught + counts["false-alarm"];
  return { roc: [normal ? counts["false-alarm"] / normal : 0, recall], pr: [recall, fired ? counts.caught / fired : 1] };
};

const moveTo = (view, point) => view && view.signal("atX", point[0]).signal("atY", point[1]).runAsync();

const drawLosses = async () => {
  const values = data.runs.flatMap((one) => one.losses.map(([step, loss]) => ({ step, loss, run: one.label })));
  if (!values.length) return;
  find("losses").hidden = false;
  const positive = values.every((one) => one.loss > 0);
  await draw("losses", {
    height: 220, data: { values },
    mark: { type: "line", strokeWidth: 2 },
    encoding: {
      x: { field: "step", type: "quantitative", title: "Training step", scale: { nice: false } },
      y: { field: "loss", type: "quantitative", title: "Loss", scale: positive ? { type: "log" } : { zero: false }, axis: { tickCount: 5 } },
      ...byRun,
    },
  });
};

// ---------------------------------------------------------------- threshold

const setThreshold = (value) => {
  thresholds[state.run] = value;
  find("slider").value = value;
  if (histogram && histogram.signal("threshold") !== value) histogram.signal("threshold", value).runAsync();
  const points = operatingPoints(showCounts());
  moveTo(roc, points.roc);
  moveTo(precision, points.pr);
  scheduleGallery();
};

// The gallery follows when the line rests.
let waiting = 0;
const scheduleGallery = () => { clearTimeout(waiting); waiting = setTimeout(showGallery, 120); };

const showThreshold = async () => {
  const any = scored().length > 0;
  find("threshold-content").hidden = !any;
  find("threshold-none").hidden = any;
  if (!any) return;
  const domain = extent(), slider = find("slider");
  [slider.min, slider.max, slider.step] = [domain[0], domain[1], (domain[1] - domain[0]) / 1000];
  slider.value = threshold();
  find("origin").textContent = `The line starts at ${(run().threshold ?? 0).toFixed(3)}: ${run().origin}.`;
  const points = operatingPoints(showCounts());
  await drawHistogram(domain);
  const curves = run().curves.roc.length > 0;
  for (const id of ["roc", "pr"]) find(id).closest("figure").hidden = !curves;
  if (curves) {
    roc = await drawCurve("roc", "roc", "False-alarm rate", "Detection rate", points.roc);
    precision = await drawCurve("pr", "pr", "Recall", "Precision", points.pr);
  }
};

// ---------------------------------------------------------------- gallery

const score = (from, index) => from.scores[index] === null ? "no score"
  : from.scores[index].toFixed(3) + (from.rate ? `, p-value ${pValue(from.rate, from.scores[index])}` : "");

const ordered = () => {
  const { scores, labels, names, kind } = run();
  const limit = threshold(), text = state.search.toLowerCase();
  const wrong = (index) => labels[index] < 0 || scores[index] === null ? -Infinity : (labels[index] ? limit - scores[index] : scores[index] - limit);
  const value = (index) => scores[index] ?? -Infinity;
  const orders = {
    worst: (a, b) => wrong(b) - wrong(a), high: (a, b) => value(b) - value(a), low: (a, b) => value(a) - value(b),
    name: (a, b) => names[a].localeCompare(names[b], undefined, { numeric: true }),
  };
  return names.map((_, index) => index)
    .filter((index) => (state.outcome === "all" || outcome(run(), index, limit) === state.outcome)
      && (state.kind < 0 || kind[index] === state.kind) && (!text || names[index].toLowerCase().includes(text)))
    .sort((a, b) => orders[state.order](a, b) || a - b);
};

const pane = (from, index, title, layers) => {
  const [width, height] = from.sizes[index];
  const box = element("span", { className: layers.some((one) => one !== null) ? "pane" : "pane empty" });
  box.style.aspectRatio = width && height ? `${width} / ${height}` : "1";
  for (const layer of layers) {
    if (layer !== null) box.append(element("img", { src: data.pictures[layer], alt: "" }));
  }
  return element("span", {}, box, element("span", { className: "name", textContent: title }));
};

const panes = (from, index) => {
  const shown = from.shown[index];
  if (!shown) return null;
  const [picture, map, mask] = shown;
  const truth = from.labels[index] === 1 ? (mask === null ? "truth: no mask" : "truth") : from.labels[index] === 0 ? "truth: normal" : "truth: unknown";
  return element("span", { className: "panes" },
    pane(from, index, "image", [picture]), pane(from, index, truth, [picture, mask]),
    pane(from, index, map === null ? "no map" : "map", [map]), pane(from, index, "overlay", map === null ? [null] : [picture, map, mask]));
};

const caption = (from, index, limit) => element("span", { className: "caption" },
  element("span", { textContent: from.names[index] }),
  element("span", {}, element("span", { className: "badge", textContent: OUTCOMES[outcome(from, index, limit)][1] }), ` ${score(from, index)}`));

let list = [];

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
  find("found").textContent = `${list.length} of ${run().names.length} images` + (without ? `; ${without} of them without pictures, to keep this page small` : "");
  find("page").textContent = `Page ${state.page + 1} of ${pages}`;
  find("previous").disabled = state.page === 0;
  find("next").disabled = state.page === pages - 1;
  find("pages").hidden = pages === 1;
  find("cards").replaceChildren(...list.slice(state.page * PER_PAGE, (state.page + 1) * PER_PAGE).map((index, place) => {
    const name = outcome(run(), index, threshold());
    const card = element("button", { type: "button", className: `card ${name}` });
    card.append(panes(run(), index) ?? "", caption(run(), index, threshold()));
    card.addEventListener("click", () => enlarge(state.page * PER_PAGE + place));
    return element("li", {}, card);
  }));
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

// ---------------------------------------------------------------- enlarged image

// Where each path is in a run.
const places = new Map();
const placesOf = (from) => {
  if (!places.has(from)) places.set(from, new Map(from.names.map((name, index) => [from.folder + name, index])));
  return places.get(from);
};

const enlarge = (place) => {
  if (place < 0 || place >= list.length) return;
  state.open = place;
  const index = list[place], name = run().names[index];
  find("large-name").textContent = name;
  const content = find("large-content");
  content.replaceChildren();
  // The same image in the other runs, if they have it.
  data.runs.forEach((other, number) => {
    const same = number === state.run ? index : placesOf(other).get(run().folder + name);
    if (same === undefined) return;
    const heading = element("p", { className: outcome(other, same, thresholds[number]) },
      element("span", { textContent: data.runs.length > 1 ? `${other.label}: ` : "" }),
      element("span", { className: "badge", textContent: OUTCOMES[outcome(other, same, thresholds[number])][1] }),
      ` score ${score(other, same)}, threshold ${thresholds[number].toFixed(3)}, kind ${other.kinds[other.kind[same]] || "unknown"}`);
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
find("slider").addEventListener("input", (event) => setThreshold(Number(event.target.value)));
find("reset").addEventListener("click", () => setThreshold(run().threshold ?? 0));
find("kind").addEventListener("change", (event) => filter({ kind: Number(event.target.value) }));
find("order").addEventListener("change", (event) => filter({ order: event.target.value }));
find("search").addEventListener("input", (event) => filter({ search: event.target.value }));
find("previous").addEventListener("click", () => turn(-1));
find("next").addEventListener("click", () => turn(1));
find("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
addEventListener("beforeprint", () => { for (const one of document.querySelectorAll("details")) one.open = true; });
find("run")?.addEventListener("change", (event) => { state.run = Number(event.target.value); showRun(); });

const showRun = async () => {
  state.kind = -1;
  state.page = 0;
  find("kind").replaceChildren(element("option", { value: -1, textContent: "all kinds" }),
    ...run().kinds.map((kind, index) => element("option", { value: index, textContent: kind })));
  const any = run().names.length > 0;
  find("gallery-content").hidden = !any;
  find("gallery-none").hidden = any;
  if (any) showGallery();
  await showThreshold();
};

await showRun();
await drawLosses();
document.documentElement.dataset.ready = "true";
