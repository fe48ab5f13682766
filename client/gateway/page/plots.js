// Live gauges of the engine: /v1/metrics is read once a second and drawn as curves of the last two minutes.
"use strict";

const NUM_POINTS = 120;
const PERIOD_MS = 1000;
const SVG = "http://www.w3.org/2000/svg";

// Each plot says how its value follows from this reading and the one before (names of samples -> values).
const PLOTS = [
  { id: "running", name: "Running", unit: "", least: 4, value: (now) => now.num_requests_running },
  { id: "waiting", name: "Waiting", unit: "", least: 4, value: (now) => now.num_requests_waiting },
  { id: "pages", name: "Pages", unit: "", least: 8, value: (now) => now.nemo_kv_pages_used,
    note: (now) => ` of ${format(now.nemo_kv_pages_used + now.nemo_kv_pages_cached + now.nemo_kv_pages_free)}` },
  { id: "speed", name: "Tokens/s", unit: "", least: 10,
    value: (now, before) => rate(now, before, "nemo_response_tokens_total") },
  { id: "hits", name: "Prefix hits", unit: " %", least: 100,
    value: (now) => percent(now.nemo_prefix_hit_tokens_total, now.nemo_prefix_queried_tokens_total) },
];

function rate(now, before, name) {
  if (!before || !(now[name] >= before[name])) return 0;
  return (now[name] - before[name]) / Math.max(0.1, now.seconds - before.seconds);
}

function percent(part, whole) {
  return whole > 0 ? (100 * part) / whole : 0;
}

function format(value) {
  if (!Number.isFinite(value)) return "–";
  return value.toLocaleString("en", { maximumFractionDigits: value < 10 && value % 1 ? 1 : 0 });
}

// Samples by name; of several with labels the sum.
function parseMetrics(text) {
  const samples = { seconds: performance.now() / 1000 };
  for (const line of text.split("\n")) {
    if (!line || line.startsWith("#")) continue;
    const name = line.split(/[{ ]/, 1)[0];
    samples[name] = (samples[name] || 0) + Number(line.slice(line.lastIndexOf(" ") + 1));
  }
  return samples;
}

function makePlot(plot) {
  const box = document.createElement("div");
  box.className = "plot";
  box.id = `plot-${plot.id}`;
  const name = document.createElement("span");
  name.className = "name";
  name.textContent = plot.name;
  const value = document.createElement("span");
  value.className = "value";
  value.textContent = "–";
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${NUM_POINTS - 1} 44`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  const fill = document.createElementNS(SVG, "path");
  fill.setAttribute("class", "fill");
  const curve = document.createElementNS(SVG, "path");
  curve.setAttribute("class", "curve");
  svg.append(fill, curve);
  box.append(name, value, svg);
  document.getElementById("plots").append(box);
  return { ...plot, points: [], elements: { value, svg, fill, curve } };
}

function draw(plot, now, before) {
  const known = plot.value(now, before);
  const value = Number.isFinite(known) ? known : null;
  plot.points.push(value);
  if (plot.points.length > NUM_POINTS) plot.points.shift();
  const { elements } = plot;
  elements.value.textContent = value === null ? "–" : format(value) + plot.unit;
  if (value !== null && plot.note) {
    const note = document.createElement("small");
    note.textContent = plot.note(now);
    elements.value.append(note);
  }
  const most = Math.max(plot.least, ...plot.points.filter((each) => each !== null));
  elements.svg.setAttribute("aria-label", `${plot.name}: ${elements.value.textContent}, at most ${format(most)} shown`);
  const first = NUM_POINTS - plot.points.length;
  const places = plot.points.map((each, index) => (each === null ? null : `${first + index},${(43 - (41 * each) / most).toFixed(1)}`));
  let path = "";
  places.forEach((place, index) => {
    if (place) path += `${index && places[index - 1] ? "L" : "M"}${place}`;
  });
  elements.curve.setAttribute("d", path);
  const whole = places.every(Boolean);
  elements.fill.setAttribute("d", whole && path ? `${path}L${NUM_POINTS - 1},44L${first},44Z` : "");
}

async function watch() {
  const plots = PLOTS.map(makePlot);
  let before = null;
  for (;;) {
    try {
      const [metrics, ready] = await Promise.all([fetch("/v1/metrics"), fetch("/v1/health/ready")]);
      const now = parseMetrics(await metrics.text());
      plots.forEach((plot) => draw(plot, now, before));
      before = now;
      showStatus(ready.ok ? "ready" : "not ready", ready.ok ? "ready" : "");
    } catch {
      before = null;
      plots.forEach((plot) => draw(plot, {}, null));
      showStatus("no connection", "away");
    }
    await new Promise((resolve) => setTimeout(resolve, document.hidden ? 5 * PERIOD_MS : PERIOD_MS));
  }
}

function showStatus(text, kind) {
  const status = document.getElementById("status");
  if (status.textContent !== text) status.textContent = text;
  document.getElementById("dot").className = `dot ${kind}`;
}

watch();
