const items = data.items;
const labels = [...new Set(items.flatMap(item => item.views.map(view => view.label)))];
for (const label of labels) $("view").append(make("option", { value: label, textContent: label }));
if (!items.some(item => item.main !== null)) {
  $("least-label").hidden = true;
  for (const option of [...$("sort").options]) if (option.value.startsWith("main")) option.remove();
}

const grade = value => value >= 0.7 ? "good" : value >= 0.4 ? "fair" : "poor";
const viewOf = (item, label) => item.views.find(view => view.label === label) || item.views[0];

// Pictures are given to cards when these come near the window, and taken away when they are far from it.
const near = new IntersectionObserver(entries => {
  for (const { target, isIntersecting } of entries) {
    target.near = isIntersecting;
    show(target);
  }
}, { rootMargin: "800px" });

function show(card) {
  const image = card.querySelector("img");
  if (card.near) image.src = viewOf(card.item, $("view").value).src;
  else image.removeAttribute("src");
}

const cards = items.map((item, index) => {
  const [width, height] = item.size;
  const image = make("img", { alt: item.prompt || item.name, width, height });
  image.style.aspectRatio = `${width} / ${height}`;
  const name = make("span", { className: "name" }, make("span", { textContent: item.name, title: item.name }));
  if (item.main !== null) {
    name.append(make("span", { className: `score ${grade(item.main)}`, textContent: item.main.toFixed(2) }));
  }
  const words = make("span", { className: "words" }, name, make("p", { textContent: item.prompt }));
  const card = make("button", { className: "card", type: "button" }, image, words);
  Object.assign(card, { item, index, onclick: () => open(card) });
  near.observe(card);
  return card;
});

const orders = {
  "name": (a, b) => a.index - b.index,
  "prompt": (a, b) => a.item.prompt.localeCompare(b.item.prompt) || a.index - b.index,
  "main-down": (a, b) => (b.item.main ?? -1) - (a.item.main ?? -1) || a.index - b.index,
  "main-up": (a, b) => (a.item.main ?? 2) - (b.item.main ?? 2) || a.index - b.index,
};
let shown = cards;

function arrange() {
  const words = $("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  const least = Number($("least").value);
  $("least-value").textContent = least.toFixed(2);
  cards.sort(orders[$("sort").value]);
  for (const card of cards) {
    const text = `${card.item.name} ${card.item.prompt}`.toLowerCase();
    card.hidden = !words.every(word => text.includes(word)) || (least > 0 && (card.item.main ?? -1) < least);
  }
  $("grid").append(...cards);
  shown = cards.filter(card => !card.hidden);
  const scores = shown.map(card => card.item.main).filter(score => score !== null);
  const mean = scores.length ? `, mean score ${(scores.reduce((a, b) => a + b) / scores.length).toFixed(2)}` : "";
  $("count").textContent = (shown.length === cards.length ? "" : `${shown.length} of `) + `${cards.length} images${mean}`;
}

function open(card) {
  const item = card.item;
  $("one").card = card;
  $("one-name").textContent = item.name;
  $("one-prompt").textContent = item.prompt;
  $("one-views").replaceChildren(...item.views.map(view => make("figure", {},
    make("img", { src: view.src, alt: view.label }),
    make("figcaption", { textContent: view.label + (view.legend ? `: ${view.legend}` : "") }))));
  const lines = Object.entries(item.scores).map(([kind, scores]) => make("p", {
    textContent: `${kind}: ` + Object.entries(scores).filter(([name]) => name !== "main")
      .map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`).join(", "),
  }));
  $("one-scores").replaceChildren(...lines, ...item.why.map(text => make("p", { className: "hint", textContent: text })));
  $("one-command").textContent = item.command;
  $("one-copy").onclick = () => copy(item.command, $("one-copy"));
  $("one-facts").replaceChildren(...item.facts.map(([name, value]) => make("tr", {},
    make("th", { textContent: name }), make("td", { textContent: value }))));
  if (!$("one").open) $("one").showModal();
}

$("one").onkeydown = event => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  const next = shown[shown.indexOf($("one").card) + step];
  if (step && next) open(next);
};
$("one").onclick = event => { if (event.target === $("one")) $("one").close(); };
$("one").onclose = () => $("one").card.focus();
for (const id of ["find", "sort", "least"]) $(id).oninput = arrange;
$("view").oninput = () => cards.forEach(show);
$("width").oninput = () => document.documentElement.style.setProperty("--width", `${$("width").value}px`);
arrange();
