const runs = data.runs;
const hues = ["#1f77b4", "#e8762d", "#2c9c4b", "#c43c4e", "#8a63c9", "#8d6e54", "#d169b0", "#5f8a8b"];
const hue = k => hues[k % hues.length];
const several = runs.length > 1;

$("verdicts").append(...runs.map((run, k) => {
  const box = make("article", { className: "verdict" },
    make("span", { className: "state", textContent: run.state }), make("h3", { textContent: run.name }),
    ...run.lines.map(line => make("p", { textContent: line })),
    make("progress", { max: run.of, value: Math.min(run.step, run.of) }));
  box.style.setProperty("--hue", hue(k));
  return box;
}));

// Plots: lines over steps, in one scale; the cursor stands at the slider's step.
const W = 1100, L = 62, R = 12, T = 10, B = 26;
const svg = (tag, fields) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(fields)) element.setAttribute(name, value);
  return element;
};

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(n => n * power).find(n => n >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step / 1e6; value += step) found.push(value);
  return found;
}

function plot(place, height, lines, bands) {
  const points = [...lines.flatMap(line => line.points), ...bands.flatMap(band => band.points)];
  if (!points.length) {
    place.append(make("p", { className: "hint", textContent: "nothing measured yet" }));
    return () => {};
  }
  const last = Math.max(1, ...runs.map(run => run.step));
  const values = points.map(point => point[1]);
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const margin = (high - low || Math.abs(high) || 1) * 0.06;
  [low, high] = [low - margin, high + margin];
  const x = step => L + (W - L - R) * step / last;
  const y = value => height - B - (height - T - B) * (value - low) / (high - low);
  const picture = svg("svg", { viewBox: `0 0 ${W} ${height}`, role: "img" });
  for (const value of ticks(low, high, 4)) {
    picture.append(svg("line", { x1: L, x2: W - R, y1: y(value), y2: y(value), class: "axis" }));
    const text = svg("text", { x: L - 8, y: y(value) + 4, "text-anchor": "end" });
    text.textContent = +value.toPrecision(3);
    picture.append(text);
  }
  for (const step of ticks(0, last, 8)) {
    const text = svg("text", { x: x(step), y: height - 6, "text-anchor": step ? "middle" : "start" });
    text.textContent = step.toLocaleString("en");
    picture.append(text);
  }
  const path = points => points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
  for (const { points, fill } of bands) picture.append(svg("polygon", { points: path(points), style: `fill: ${fill}` }));
  for (const { points, stroke, opacity, dots } of lines) {
    picture.append(svg("polyline", { points: path(points), fill: "none", stroke, "stroke-opacity": opacity, "stroke-width": 1.8 }));
    if (dots && points.length < 120) for (const [step, value] of points) {
      const dot = svg("circle", { cx: x(step), cy: y(value), r: 3, fill: stroke });
      dot.append(svg("title", {}));
      dot.firstChild.textContent = `step ${step.toLocaleString("en")}: ${value.toPrecision(3)}`;
      picture.append(dot);
    }
  }
  const cursor = svg("line", { x1: 0, x2: 0, y1: T, y2: height - B, class: "cursor", visibility: "hidden" });
  picture.append(cursor);
  place.append(picture);
  return step => {
    cursor.setAttribute("visibility", "visible");
    for (const name of ["x1", "x2"]) cursor.setAttribute(name, x(Math.min(step, last)));
  };
}

const gaps = runs.map((run, k) => ({ points: run.validations.map(row => [row[0], row[1]]), stroke: hue(k), opacity: 1, dots: true }));
const noise = runs.map(run => ({
  points: [...run.validations.map(row => [row[0], row[2]]), ...run.validations.map(row => [row[0], -row[2]]).reverse()],
  fill: several ? "none" : "var(--band)",
}));
const losses = runs.flatMap((run, k) => [
  { points: run.loss, stroke: hue(k), opacity: 0.3 },
  { points: run.validations.map(row => [row[0], row[3]]), stroke: hue(k), opacity: 1, dots: true },
]);
const cursors = [plot($("gap"), 300, gaps, noise), plot($("loss"), 220, losses, [])];

// Pictures over the steps: of each run the last ones made until then.
const steps = [...new Set(runs.flatMap(run => run.shots.map(shot => shot.step)))].sort((a, b) => a - b);
const slider = $("step");
const figures = [];
for (const [k, run] of runs.entries()) {
  if (!run.shots.length) continue;
  if (several) {
    const swatch = make("span", { className: "swatch" });
    swatch.style.background = hue(k);
    $("shots").append(make("h3", {}, swatch, run.name));
  }
  const count = run.shots[0].pictures.length;
  const strip = make("div", { className: "strip" });
  for (let i = 0; i < count; i++) {
    const held = run.held_out[i];
    const column = make("div", {});
    if (held) column.append(
      make("figure", {}, make("img", { src: held.condition, alt: `${run.kind}, held out` }), make("figcaption", { textContent: `its ${run.kind}` })));
    const made = make("img", { alt: "what the network made of it" });
    figures.push({ run, i, made });
    column.append(make("figure", {}, made, make("figcaption", { textContent: "made of it" })));
    if (held) column.append(
      make("figure", {}, make("img", { src: held.picture, alt: "held-out picture" }), make("figcaption", { textContent: "the picture it was made from" })));
    strip.append(column);
  }
  $("shots").append(strip);
}

function at(index) {
  const step = steps[index];
  slider.value = index;
  $("step-value").textContent = `step ${step.toLocaleString("en")}`;
  for (const { run, i, made } of figures) {
    const shot = run.shots.filter(one => one.step <= step).at(-1) || run.shots[0];
    made.src = shot.pictures[i];
  }
  for (const move of cursors) move(step);
}

let timer = null;
function stop() {
  clearInterval(timer);
  timer = null;
  $("play").textContent = "play";
}
if (steps.length) {
  slider.max = steps.length - 1;
  slider.oninput = () => { stop(); at(Number(slider.value)); };
  $("play").onclick = () => {
    if (timer) return stop();
    $("play").textContent = "stop";
    at(0);
    timer = setInterval(() => {
      if (Number(slider.value) >= steps.length - 1) return stop();
      at(Number(slider.value) + 1);
    }, 450);
  };
  at(steps.length - 1);
} else {
  $("over-steps").hidden = true;
}

// Settings, those that differ first marked.
function settings() {
  const rows = data.settings.filter(row => !$("only").checked || row.differs);
  $("settings").replaceChildren(
    ...(several ? [make("tr", {}, make("th", {}), ...runs.map(run => make("th", { textContent: run.name })))] : []),
    ...rows.map(({ values: [name, ...values], differs }) => make("tr", { className: several && differs ? "differs" : "" },
      make("th", { textContent: name }), ...values.map(value => make("td", { textContent: value })))));
}
$("only-row").hidden = !several;
$("only").checked = several;
$("only").oninput = settings;
settings();
