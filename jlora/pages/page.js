"use strict";
// Search, filter and order of the lists of rows. Without JavaScript, a page shows all rows and no controls.

const plain = (text) => text.normalize("NFKC").toLowerCase();

for (const list of document.querySelectorAll(".row-list")) {
  const controls = list.querySelector(".controls"), place = list.querySelector(".rows");
  const search = controls.querySelector("input"), count = controls.querySelector("output");
  const choice = controls.querySelector(".tag-choice"), order = controls.querySelector(".order");
  const rows = Array.from(place.children, (node) => ({
    node,
    number: "number" in node.dataset ? Number(node.dataset.number) : NaN,
    tags: new Set(Array.from(node.querySelectorAll(".tag"), (tag) => tag.textContent)),
    text: plain(Array.from(node.querySelectorAll("h3, .text"), (text) => text.textContent).join("\n")),
  }));
  const all = `${rows.length.toLocaleString("en")} ${rows.length === 1 ? "row" : "rows"}`;

  function filter() {
    const words = plain(search.value).split(/\s+/), tag = choice?.value;
    let shown = 0;
    for (const row of rows) {
      const found = (!tag || row.tags.has(tag)) && words.every((word) => row.text.includes(word));
      if (row.node.hidden === found) row.node.hidden = !found;
      shown += found;
    }
    count.textContent = shown === rows.length ? all : `${shown.toLocaleString("en")} of ${all}`;
  }

  function sort() {
    const sign = Number(order.value);
    const last = (row) => (Number.isNaN(row.number) ? Infinity : sign * row.number);  // rows without a number
    const sorted = sign ? rows.toSorted((a, b) => (last(a) < last(b) ? -1 : last(a) > last(b) ? 1 : 0)) : rows;
    for (const row of sorted) place.append(row.node);
  }

  let timer;
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(filter, 120);
  });
  choice?.addEventListener("change", filter);
  order?.addEventListener("change", sort);
  controls.hidden = false;
}
