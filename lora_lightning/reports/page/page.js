
// Everything on this page is there without this script; it adds the values under the pointer, sorting and copying.
for (const chart of document.querySelectorAll("[data-values]")) {
  const { x, y, lines } = JSON.parse(chart.dataset.values);
  const area = chart.querySelector(".area");
  const cursor = area.appendChild(Object.assign(document.createElement("i"), { className: "cursor", hidden: true }));
  const tip = area.appendChild(Object.assign(document.createElement("div"), { className: "tip", hidden: true }));
  const number = (value) => Math.abs(value) < 0.01 && value ? value.toExponential(2) : String(+value.toPrecision(4));
  const show = (event) => {
    const box = area.getBoundingClientRect();
    const step = x[0] + (event.clientX - box.left) / box.width * (x[1] - x[0]);
    const nearest = lines.map(([name, tone, points]) =>
      [name, tone, points.reduce((a, b) => Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a)]);
    const at = nearest.reduce((a, b) => Math.abs(b[2][0] - step) < Math.abs(a[2][0] - step) ? b : a)[2][0];
    const left = x[1] > x[0] ? (at - x[0]) / (x[1] - x[0]) : 0.5;
    tip.replaceChildren(...[["step " + at, "", null], ...nearest.map(([name, tone, point]) =>
      [name + " " + number(point[1]) + (point[0] === at ? "" : " at " + point[0]), tone])].map(([text, tone]) =>
      Object.assign(document.createElement("span"), { textContent: text, className: tone })));
    cursor.style.left = 100 * left + "%";
    tip.style.left = 100 * left + "%";
    tip.classList.toggle("leftwards", left > 0.5);
    cursor.hidden = tip.hidden = false;
  };
  area.addEventListener("pointermove", show);
  area.addEventListener("pointerdown", show);
  area.addEventListener("pointerleave", () => { cursor.hidden = tip.hidden = true; });
}
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const key = (row, place) => row.cells[place].textContent.trim();
  const value = (text) => parseFloat(text.replace(/,/g, "").replace("−", "-"));
  [...table.tHead.rows[0].cells].forEach((head, place) => {
    if (!head.textContent.trim()) return;
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const way = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", way > 0 ? "ascending" : "descending");
      const order = (a, b) => {
        const [one, two] = [key(a, place), key(b, place)], [m, n] = [value(one), value(two)];
        if (isNaN(m) !== isNaN(n)) return isNaN(m) ? 1 : -1;
        return way * (isNaN(m) ? one.localeCompare(two) : m - n);
      };
      body.append(...[...body.rows].sort(order));
    });
  });
}
for (const code of document.querySelectorAll("pre.command")) {
  if (!navigator.clipboard) break;
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: "copy", className: "copy" });
  const text = code.textContent.trim();
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    button.textContent = "copied";
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  });
  code.append(button);
}
