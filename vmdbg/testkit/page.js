// SPDX-License-Identifier: GPL-2.0-or-later
// What the results page can do besides being read.
document.documentElement.classList.add("scripted");
document.addEventListener("click", event => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  const text = button.parentElement.querySelector("pre").textContent;
  const done = () => { button.textContent = "Copied"; setTimeout(() => { button.textContent = "Copy"; }, 1500); };
  const select = () => {
    const range = document.createRange();
    range.selectNodeContents(button.parentElement.querySelector("pre"));
    const selection = getSelection();
    selection.removeAllRanges();
    selection.addRange(range);
    if (document.execCommand("copy")) done();
  };
  if (navigator.clipboard && isSecureContext) navigator.clipboard.writeText(text).then(done, select); else select();
});
const filter = document.getElementById("filter");
filter.addEventListener("input", () => {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const table of document.querySelectorAll("main table")) {
    let shown = 0;
    for (const row of table.rows) {
      const text = (table.caption.textContent + " " + row.textContent).toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
      shown += !row.hidden;
    }
    table.hidden = !shown;
  }
});
