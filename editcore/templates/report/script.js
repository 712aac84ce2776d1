// Code: folded until asked for, and remembered on the next page.
const button = document.getElementById("code");
const stored = { shown: "Hide code", folded: "Show code" };
function fold(state) {
  document.querySelectorAll("details.code").forEach((part) => { part.open = state === "shown"; });
  if (button) button.textContent = stored[state];
  try { localStorage.setItem("editcore-code", state); } catch { /* no storage: not remembered */ }
}
let state = "folded";
try { state = localStorage.getItem("editcore-code") ?? state; } catch { /* folded then */ }
fold(state);
if (button) button.onclick = () => fold(button.textContent === stored.shown ? "folded" : "shown");

// Figures: as large as the window while they are clicked.
document.querySelectorAll("figure img").forEach((image) => {
  const box = document.createElement("button");
  box.className = "zoom";
  box.title = "Enlarge";
  image.replaceWith(box);
  box.append(image);
  box.onclick = () => {
    const large = document.createElement("dialog");
    large.append(image.cloneNode());
    large.onclick = () => large.close();
    large.onclose = () => large.remove();
    document.body.append(large);
    large.showModal();
  };
});

// Tables: sorted by a click on a heading; words stand to the left, numbers to the right.
const value = (row, column) => row.cells[column]?.textContent.trim() ?? "";
document.querySelectorAll("table.dataframe").forEach((table) => {
  const heads = [...table.querySelectorAll("thead tr:only-child > *")];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    const words = [...body.rows].some((row) => !/^$|^[-+−.\d]/.test(value(row, column)));
    if (words) for (const row of table.rows) row.cells[column]?.classList.add("words");
    head.tabIndex = 0;
    head.onclick = () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * value(a, column).localeCompare(
        value(b, column), undefined, { numeric: true })));
    };
    head.onkeydown = (event) => { if (event.key === "Enter") head.onclick(); };
  });
});

// Pages of a long table: rows that hold every word of the search.
document.querySelectorAll("table.search").forEach((table) => {
  const field = document.createElement("input");
  field.type = "search";
  field.placeholder = "Search";
  field.setAttribute("aria-label", "Search the table");
  table.before(field);
  field.oninput = () => {
    const words = field.value.toLowerCase().split(/\s+/);
    for (const row of table.tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  };
});
for (const part of document.querySelectorAll(".output, pre")) {
  if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
}
