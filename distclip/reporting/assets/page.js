"use strict";
// Draws the document in #data with Plotly. All text goes in as text nodes: names come from files of others.

const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const main = document.getElementById("main");
const coarse = matchMedia("(pointer: coarse)").matches; // a finger on a plot must scroll the page
const narrow = () => innerWidth < 640;
const RUN_COLOURS = {
  light: ["#0072b2", "#d55e00", "#007a5a", "#a8467f", "#8a6d00", "#3b8ec2", "#555555"],
  dark: ["#56b4e9", "#ff7a45", "#3ac79b", "#dd93bd", "#f0e442", "#9cd3f5", "#bbbbbb"],
};
const DASHES = ["solid", "dash", "dot", "dashdot"]; // runs differ by more than colour
let redraws = []; // one function a plot

// --- elements and numbers ---------------------------------------------------------------------------------------

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const ARRAYS = { u1: Uint8Array, i2: Int16Array, i4: Int32Array, f4: Float32Array, f8: Float64Array };
function unpack(packed) {
  const bytes = Uint8Array.from(atob(packed.base64), (c) => c.charCodeAt(0));
  return new ARRAYS[packed.dtype](bytes.buffer);
}

const whole = (n) => n.toLocaleString("en-US");
function short(n) {
  if (n === null || !isFinite(n)) return "none";
  const size = Math.abs(n);
  return size >= 1000 && size < 1e7 ? whole(+n.toPrecision(3)) : String(+n.toPrecision(3));
}
function percent(share) {
  if (share === 0 || share === 1 || (share >= 0.0995 && share <= 0.9905)) return `${(100 * share).toFixed(0)} %`;
  if (share >= 5e-6 && share <= 1 - 5e-6) return `${(100 * share).toFixed(share >= 0.00095 && share <= 0.9994 ? 1 : 3)} %`;
  return share < 0.5 ? "< 0.001 %" : "> 99.999 %";
}

// --- how plots look ---------------------------------------------------------------------------------------------

const dark = () => root.dataset.theme === "dark";
const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
const faint = (name, share) => `color-mix(in srgb, ${colour(name)} ${share}%, ${colour("card")})`;
function solid(css) { // a browser's colour as #rrggbb, which Plotly reads
  const context = el("canvas").getContext("2d");
  context.fillStyle = css;
  context.fillRect(0, 0, 1, 1);
  const [r, g, b] = context.getImageData(0, 0, 1, 1).data;
  return `rgb(${r},${g},${b})`;
}

function axis(title, more = {}) {
  return {
    title: { text: title, font: { size: 12, color: colour("soft") }, standoff: 6 },
    gridcolor: colour("grid"), linecolor: colour("line"), zeroline: false, automargin: true,
    tickfont: { color: colour("soft"), size: 11.5 }, ...more,
  };
}

function layout(more) {
  return {
    paper_bgcolor: colour("card"), plot_bgcolor: colour("card"),
    font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: colour("ink") },
    margin: { l: narrow() ? 44 : 60, r: narrow() ? 6 : 14, t: 8, b: 40 },
    legend: { orientation: "h", x: 0, y: 1.01, yanchor: "bottom", font: { size: 12 } },
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink"), size: 12.5 } },
    dragmode: coarse ? false : "zoom", uirevision: "kept", separators: ".,", ...more,
  };
}

const STEPS = () => axis("step", { tickformat: ",d", hoverformat: ",d" });
const LOG = (title, more) => axis(title, { type: "log", tickformat: "~g", nticks: 4, ...more });

function card(title, why, ...children) {
  const head = el("div", { class: "head" }, el("h2", {}, title));
  const made = el("section", { class: "card" }, head, ...(why ? [el("p", { class: "why" }, why)] : []), ...children);
  main.append(made);
  return [made, head];
}

/** A plot in a card: `build()` returns its traces and layout, and is called again when colours change. */
function figure(name, title, why, height, build, toggles = []) {
  const [made, head] = card(title, why);
  const plot = el("div", { class: "plot", id: name, role: "img", "aria-label": `${title}. ${why}` });
  plot.style.height = `${height}px`;
  for (const [text, pressed, act] of toggles) {
    const button = el("button", { type: "button", "aria-pressed": String(pressed) }, text);
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      act(on);
      draw();
    });
    head.append(button);
  }
  for (const format of ["png", "svg"]) {
    const save = () => Plotly.downloadImage(plot, { format, filename: `distclip-${name}`, scale: format === "png" ? 2 : 1, width: plot.clientWidth, height });
    head.append(el("button", { type: "button", onclick: save, "aria-label": `Save as ${format.toUpperCase()}` }, format.toUpperCase()));
  }
  made.append(plot);
  const config = { responsive: true, displayModeBar: false }; // its buttons are ours, dragging and a double-click
  const draw = () => Plotly.react(plot, ...build(), config);
  redraws.push(draw);
  draw();
}

function table(headings, rows, numbers) {
  const cell = (tag, content, k) => el(tag, { class: numbers.includes(k) ? "number" : "name" }, content);
  const head = el("tr", {}, ...headings.map((text, k) => cell("th", text, k)));
  const body = rows.map(({ chosen, cells }) => el("tr", { class: chosen ? "chosen" : null }, ...cells.map((c, k) => cell("td", c, k))));
  return el("div", { class: "scroll" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...body)));
}

// --- one run ----------------------------------------------------------------------------------------------------

function showTiles(run) {
  const tiles = run.tiles.map(([name, value, below]) => el("div", { class: "tile" }, el("span", {}, name), el("b", {}, value), el("span", {}, below)));
  main.append(el("div", { class: "tiles" }, ...tiles));
}

function adviceRow(weight, title, reason) {
  return el("div", { class: "advice" }, el("span", { class: `weight ${weight}` }, weight), el("div", {}, el("strong", {}, title), el("p", {}, reason)));
}

function showAdvice(run) {
  card("What it says", "", ...run.advice.map(([, weight, title, reason]) => adviceRow(weight, title, reason)));
}

function showNorm(run) {
  const x = unpack(run.norm.x), y = unpack(run.norm.y), what = unpack(run.norm.what);
  const where = (k) => [...x.keys()].filter((i) => what[i] === k);
  const clipped = where(1), high = y.reduce((a, b) => Math.max(a, b), 0);
  let log = true;
  const build = () => {
    const line = (name, xs, ys, tone, more = {}) => ({ type: "scatter", mode: "lines", name, x: xs, y: ys, line: { color: colour(tone), width: 1.4 }, ...more });
    const dots = (name, xs, ys, tone, symbol, size, more = {}) => ({ type: "scatter", mode: "markers", name, x: xs, y: ys, marker: { color: colour(tone), symbol, size, line: { width: 0 } }, ...more });
    const traces = [line("norm", x, y, "norm", { hovertemplate: "norm %{y:.4g}<extra></extra>" })];
    if (clipped.length) {
      const shown = clipped.length > x.length / 2 ? "legendonly" : true; // else nothing else is seen
      traces.push(dots("clipped", clipped.map((i) => x[i]), clipped.map((i) => y[i]), "clipped", "circle", 4.5, { visible: shown, hoverinfo: "skip" }));
    }
    if (run.bound) {
      const bounds = unpack(run.bound.y), fixed = bounds.every((b) => b === bounds[0]); // then it has two points
      const told = fixed ? { hoverinfo: "skip" } : { hovertemplate: "bound %{y:.4g}<extra></extra>" };
      traces.push(line(fixed ? `bound ${short(bounds[0])}` : "bound", unpack(run.bound.x), bounds, "bound", { line: { color: colour("bound"), width: 1.6, dash: "dash", shape: "hv" }, ...told }));
    }
    if (run.skipped) traces.push(dots("skipped", unpack(run.skipped.x), unpack(run.skipped.y), "skipped", "x", 8, { hovertemplate: "skipped<extra></extra>" }));
    if (run.spikes.length) {
      const texts = run.spikes.map(([, , times, , layers]) => `spike, ${short(times)} x` + layers.map(([name, share]) => `<br>${percent(share)} ${escaped(name)}`).join(""));
      traces.push(dots("spikes", run.spikes.map((s) => s[0]), run.spikes.map((s) => s[1]), "spike", "triangle-up", 10, { text: texts, hovertemplate: "%{text}<extra></extra>" }));
    }
    if (run.bad.length) traces.push(dots("NaN or inf", run.bad.map((b) => b[0]), run.bad.map(() => high * 1.2 || 1), "problem", "x-thin", 10, { marker: { color: colour("problem"), symbol: "x-thin", size: 10, line: { width: 2, color: colour("problem") } }, text: run.bad.map((b) => wrapped(b[1] || "not finite")), hovertemplate: "%{text}<extra></extra>" }));
    const rows = 1 + (run.shares ? 1 : 0) + (run.loss ? 1 : 0), low = [0, 0.26, 0.48][rows - 1];
    const panels = { yaxis: (log ? LOG : axis)("norm", { domain: [low, 1], fixedrange: false }) };
    if (run.shares) {
      panels.yaxis2 = axis(narrow() ? "%" : "% clipped", { domain: run.loss ? [0.26, 0.42] : [0, 0.19], range: [0, 100], nticks: 3 });
      const area = (name, key, tone) => line(name, unpack(run.shares.x), unpack(run.shares[key]), tone, { yaxis: "y2", fill: "tozeroy", fillcolor: solid(faint(tone, 28)), line: { color: colour(tone), width: 1, shape: "hvh" }, showlegend: false, hovertemplate: `%{y:.1f} % ${name}<extra></extra>` });
      traces.push(area("clipped", "clipped", "clipped"));
      if (run.skipped || run.bad.length) traces.push(area("skipped", "skipped", "skipped"));
    }
    if (run.loss) {
      panels.yaxis3 = axis("loss", { domain: [0, 0.19], nticks: 4 });
      traces.push(line("loss", unpack(run.loss.x), unpack(run.loss.y), "loss", { yaxis: "y3", showlegend: false, hovertemplate: "loss %{y:.4g}<extra></extra>" }));
    }
    const lowest = run.loss ? "y3" : run.shares ? "y2" : "y";
    return [traces, layout({ ...panels, xaxis: { ...STEPS(), anchor: lowest }, hovermode: "x unified", hoversubplots: "axis" })];
  };
  const why = "Before clipping, with the bound. Every spike is drawn, also where many steps share a pixel. Drag to zoom, double-click to go back.";
  figure("norm", "Norm over time", why, 340 + (run.shares ? 90 : 0) + (run.loss ? 90 : 0), build, [["log", true, (on) => { log = on; }]]);
}

const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const wrapped = (text) => escaped(text).replace(/(.{1,60})(\s|$)/g, "$1<br>");

function showHistogram(run) {
  if (!run.histogram) return;
  const h = Object.fromEntries(Object.entries(run.histogram).map(([key, value]) => [key, unpack(value)]));
  const most = h.counts.reduce((a, b) => Math.max(a, b), 1);
  const build = () => {
    const traces = [
      { type: "scatter", mode: "lines", name: "steps", x: h.edges, y: [...h.counts, 0], line: { shape: "hv", width: 1.2, color: colour("norm") }, fill: "tozeroy", fillcolor: solid(faint("bar", 60)), hovertemplate: "%{y:,} steps<extra></extra>" },
      { type: "scatter", mode: "lines", name: "clipped by a bound here", x: h.x, y: h.above, yaxis: "y2", line: { width: 1.8, color: colour("clipped") }, hovertemplate: "a bound of %{x:.3g} clips %{y:.2f} %<extra></extra>" },
    ];
    for (const [name, bound] of run.candidates.filter(([name]) => !name.includes("quantile"))) {
      traces.push({ type: "scatter", mode: "lines", name: `${name}: ${short(bound)}`, x: [bound, bound], y: [0, most], hoverinfo: "skip", line: { width: 2, dash: name === "suggested" ? "dot" : "dash", color: colour(name === "suggested" ? "good" : "bound") } });
    }
    return [traces, layout({
      yaxis: axis("steps", { domain: [0.44, 1], rangemode: "tozero" }), yaxis2: axis(narrow() ? "%" : "% clipped", { domain: [0, 0.34], range: [0, 100], nticks: 5 }),
      xaxis: LOG("norm, or a bound", { anchor: "y2", hoverformat: ".3g" }), hovermode: "x unified", hoversubplots: "axis",
    })];
  };
  const rows = run.candidates.map(([name, bound, clipped, kept]) => ({ chosen: name === "suggested", cells: [name, short(bound), percent(clipped), clipped ? percent(kept) : "all"] }));
  figure("histogram", "Which bound?", "How many steps had which norm, and what a bound would have clipped: read it off the lower curve.", 400, build);
  main.lastChild.append(table(["bound", "max_norm", "would have clipped", "clipped steps keep"], rows, [1, 2, 3]));
}

function showLayers(run) {
  if (!run.layers) return;
  const { names, all } = run.layers, x = unpack(run.layers.x), flat = unpack(run.layers.z);
  const logs = names.map((_, k) => Array.from(flat.subarray(k * x.length, (k + 1) * x.length), (v) => (v === -32768 ? null : v / 1000)));
  const middle = (row) => { const s = row.filter((v) => v !== null).sort((a, b) => a - b); return s.length ? s[s.length >> 1] : 0; };
  const relative = logs.map((row) => { const m = middle(row); return row.map((v) => (v === null ? null : v - m)); });
  let own = true;
  const build = () => {
    const every = Math.ceil(names.length / 40), ticks = names.map((_, k) => k).filter((k) => k % every === 0);
    const brief = (name) => (name.length > 30 ? `…${name.slice(-29)}` : name);
    const times = logs.map((row) => row.map((v) => (v === null ? "none" : short(10 ** v))));
    const trace = {
      type: "heatmap", x, y: names.map((_, k) => k), z: own ? relative : logs, text: times, hoverongaps: false,
      customdata: names.map((name) => Array(x.length).fill(escaped(name))), hovertemplate: "%{customdata}<br>step %{x:,d}: norm %{text}<extra></extra>",
      colorscale: own ? [[0, solid(colour("norm"))], [0.5, solid(faint("grid", 60))], [1, solid(colour("spike"))]] : "Cividis",
      ...(own ? { zmin: -1, zmax: 1 } : {}),
      colorbar: { thickness: 10, outlinewidth: 0, tickfont: { color: colour("soft"), size: 11 }, ...(own ? { tickvals: [-1, -0.5, 0, 0.5, 1], ticktext: ["÷10", "÷3", "1", "×3", "×10"] } : { tickprefix: "10^" , dtick: 1, tickformat: "d" }) },
    };
    const labels = axis("", { autorange: "reversed", tickvals: ticks, ticktext: ticks.map((k) => brief(names[k])), showticklabels: !narrow(), ticks: "" });
    return [[trace], layout({ xaxis: STEPS(), yaxis: labels, showlegend: false })];
  };
  const some = all > names.length ? ` The ${names.length} of ${whole(all)} with the largest norms.` : "";
  const why = `Each row beside its own median, or the norm itself; of many steps in a cell the largest.${some}`;
  figure("layers", "Layers over time", why, Math.min(900, Math.max(220, 90 + 15 * names.length)), build, [["vs its median", true, (on) => { own = on; }]]);
}

function showSpikes(run) {
  if (!run.spikes.length) return;
  const layers = (found) => el("div", {}, ...found.map(([name, share]) => {
    const bar = el("i", { class: "share" });
    bar.style.width = `${Math.round(60 * share)}px`;
    return el("div", {}, bar, `${percent(share)} `, el("code", {}, name));
  }));
  const rows = run.spikes.map(([step, norm, times, what, found]) => ({ cells: [whole(step), short(norm), `${short(times)} ×`, what || "taken as it was", found.length ? layers(found) : "not logged"] }));
  card("Spikes", "Steps at least three times above the norms around them, and the layers that made them (their share of the squared norm). Highest first.",
    table(["step", "norm", "× surroundings", "the step was", "layers"], rows, [0, 1, 2]));
}

function showBad(run) {
  const named = run.bad.filter(([, text]) => text);
  if (named.length) card("Not finite", "What the trainer said of each step.", table(["step", "where it came from"], named.map(([step, text]) => ({ cells: [whole(step), text] })), [0]));
}

function showReplays(run) {
  if (!run.replays.length) return;
  const rows = run.replays.map(([policy, , clipped, skipped, bound]) => ({ cells: [el("code", {}, policy), percent(clipped), percent(skipped), short(bound)] }));
  card("Other policies", `Each run over the last ${whole(run.replays[0][1])} norms of this log. A run that they had clipped would have had other norms.`,
    table(["policy", "would have clipped", "skipped", "median bound"], rows, [1, 2, 3]));
}

function showRun(run) {
  showTiles(run);
  showAdvice(run);
  for (const show of [showNorm, showHistogram, showLayers, showSpikes, showBad, showReplays]) show(run);
  if (run.notes.length) card("About the log", "", ...run.notes.map((note) => el("p", {}, note)));
}

// --- many runs --------------------------------------------------------------------------------------------------

function showComparison() {
  const headings = ["run", ...data.runs[0].tiles.map(([name]) => name)];
  const rows = data.runs.map((run) => ({ cells: [run.name, ...run.tiles.map(([, value]) => value)] }));
  card("Runs side by side", "", table(headings, rows, headings.map((_, k) => k).slice(1)));
  const curves = (key) => () => {
    const tones = RUN_COLOURS[dark() ? "dark" : "light"];
    const traces = data.runs.filter((run) => run[key]).map((run) => {
      const k = data.runs.indexOf(run);
      return { type: "scatter", mode: "lines", name: run.name, x: unpack(run[key].x), y: unpack(run[key].y), opacity: 0.9,
        line: { color: tones[k % tones.length], width: 1.4, dash: DASHES[Math.floor(k / tones.length) % DASHES.length] }, hovertemplate: "%{y:.4g}" };
    });
    return [traces, layout({ xaxis: STEPS(), yaxis: (key === "norm" ? LOG : axis)(key), hovermode: "x unified" })];
  };
  figure("norms", "Norms", "Before clipping. Click a name to hide it, double-click to see it alone.", 400, curves("norm"));
  if (data.runs.some((run) => run.loss)) figure("losses", "Losses", "", 320, curves("loss"));
  if (data.advice.length) card("What they say together", "", ...data.advice.map(([, weight, title, reason]) => adviceRow(weight, title, reason)));
  card("What each says", "", ...data.runs.flatMap((run) => run.advice.slice(0, 2).map(([, weight, title, reason]) => adviceRow(weight, `${run.name}: ${title}`, reason))));
}

// --- the page ---------------------------------------------------------------------------------------------------

function show(view) {
  document.querySelectorAll(".plot").forEach((plot) => Plotly.purge(plot));
  main.replaceChildren();
  redraws = [];
  const run = data.runs[view];
  document.getElementById("about").textContent = run ? `${run.name} · ${run.program} · ${run.path}` : `${data.runs.length} runs`;
  document.querySelectorAll("nav button").forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.view === String(view))));
  if (run) showRun(run);
  else showComparison();
}

function setTheme(name) {
  root.dataset.theme = name;
  const other = name === "dark" ? "light" : "dark";
  document.getElementById("theme").textContent = other === "dark" ? "Dark" : "Light";
  redraws.forEach((draw) => draw());
}

const prefers = matchMedia("(prefers-color-scheme: dark)");
setTheme(prefers.matches ? "dark" : "light");
prefers.addEventListener("change", (event) => setTheme(event.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => setTheme(dark() ? "light" : "dark"));
if (data.runs.length > 1) {
  const views = [["all", "All runs"], ...data.runs.map((run, k) => [k, run.name])];
  document.getElementById("runs").append(...views.map(([view, text]) => el("button", { type: "button", "data-view": view, onclick: () => show(view) }, text)));
}
document.getElementById("footer").textContent = `Made by distclip ${data.version}. Shares of layers are those of the squared norm.`;
show(data.runs.length > 1 ? "all" : 0);
