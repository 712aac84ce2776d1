// Code: folded until asked for, and remembered on the next page.
const folds = document.querySelectorAll("details.code");
const button = document.getElementById("code");
function fold(open) {
  folds.forEach((part) => { part.open = open; });
  if (button) button.textContent = open ? "Hide code" : "Show code";
}
function remembered(value) {
  try {
    if (value !== undefined) localStorage.setItem("editcore-code", value);
    return localStorage.getItem("editcore-code");
  } catch { return null; }
}
if (button) button.onclick = () => {
  const open = button.textContent === "Show code";
  remembered(open ? "shown" : "folded");
  fold(open);
};
fold(remembered() === "shown");

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

// Tables: sorted by a click on a heading; long ones can be searched.
document.querySelectorAll("table.dataframe").forEach((table) => {
  const heads = [...table.querySelectorAll("thead tr:only-child > *")];
  const body = table.tBodies[0];
  const value = (row, column) => row.cells[column]?.textContent.trim() ?? "";
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    head.onclick = () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].sort((a, b) => value(a, column).localeCompare(
        value(b, column), undefined, { numeric: true }) * (up ? 1 : -1));
      body.append(...rows);
    };
    head.onkeydown = (event) => { if (event.key === "Enter") head.onclick(); };
  });
  heads.forEach((head, column) => {     // numbers stand to the right, words to the left
    const words = [...body.rows].some((row) => !/^$|^[-+−.\d]/.test(value(row, column)));
    if (words) for (const row of table.rows) row.cells[column]?.classList.add("words");
  });
  if (!table.classList.contains("search")) return;
  const field = document.createElement("input");
  field.type = "search";
  field.placeholder = "Search";
  field.setAttribute("aria-label", "Search the table");
  table.before(field);
  field.oninput = () => {
    const words = field.value.toLowerCase().split(/\s+/);
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    }
  };
});
for (const part of document.querySelectorAll(".output, pre")) {
  if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
}
