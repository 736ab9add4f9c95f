// Values under the pointer, and switches for runs. Without it the page shows the same curves.
"use strict";
const tip = document.body.appendChild(document.createElement("div"));
tip.className = "tip off";
const significant = v =>
  v === 0 ? "0" : Math.abs(v) < 1e-4 || Math.abs(v) >= 1e7 ? v.toExponential(2) : v >= 1000
    ? Math.round(v).toLocaleString("en") : String(Number(v.toPrecision(4)));
const element = (parent, tag, text, name) => {
  const made = parent.appendChild(document.createElement(tag));
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
};
const hidden = new Set();

// The index of the number nearest to x in ascending numbers.
const nearest = (xs, x) => {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] < x) low = middle; else high = middle;
  }
  return x - xs[low] < xs[high] - x ? low : high;
};

for (const chart of document.querySelectorAll(".chart")) {
  const data = JSON.parse(chart.querySelector("script").textContent);
  const plot = chart.querySelector(".plot"), cursor = chart.querySelector(".cursor");
  const [low, high] = data.xs;
  const away = () => { tip.classList.add("off"); cursor.style.display = "none"; };
  const show = event => {
    const box = plot.getBoundingClientRect();
    const x = low + (high - low) * Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const rows = [];
    for (const curve of data.curves) {
      if (!curve.x.length || hidden.has(curve.run)) continue;
      const i = nearest(curve.x, x);
      // A curve that ended long before says nothing here.
      if (Math.abs(curve.x[i] - x) > 0.1 * (high - low)) continue;
      rows.push([curve, curve.x[i], curve.y[i]]);
    }
    if (!rows.length) return away();
    const at = rows.reduce((a, b) => Math.abs(b[1] - x) < Math.abs(a[1] - x) ? b : a)[1];
    tip.replaceChildren();
    element(tip, "b", data.x + " " + Math.round(at).toLocaleString("en"));
    for (const [curve, , y] of rows.sort((a, b) => b[2] - a[2])) {
      const row = element(tip, "div");
      element(row, "i", undefined, "chip " + curve.class);
      element(row, "span", curve.name);
      element(row, "span", data.share ? significant(100 * y) + " %" : significant(y));
    }
    cursor.style.display = "block";
    cursor.style.left = 100 * (at - low) / (high - low) + "%";
    tip.classList.remove("off");
    const { width, height } = tip.getBoundingClientRect();
    const right = event.clientX + 18 + width < innerWidth;
    tip.style.left = Math.max(4, right ? event.clientX + 18 : event.clientX - 18 - width) + "px";
    tip.style.top = Math.max(4, Math.min(event.clientY - height / 2, innerHeight - height - 4)) + "px";
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", away);
}

for (const button of document.querySelectorAll("[data-toggle]")) {
  button.addEventListener("click", () => {
    const run = Number(button.dataset.toggle), off = !hidden.has(run);
    if (off) hidden.add(run); else hidden.delete(run);
    button.setAttribute("aria-pressed", String(!off));
    for (const part of document.querySelectorAll(`.plot [data-run="${run}"], .written[data-run="${run}"]`))
      part.classList.toggle("off", off);
  });
}
