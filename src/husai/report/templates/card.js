"use strict";
// The list of features works without this; it only hides lines that do not match.
const controls = document.getElementById("controls");
if (controls) {
  const lines = [...document.querySelectorAll("#list > li")];
  const words = lines.map((line) => line.textContent.toLowerCase());
  const numbers = lines.map((line) => line.querySelector(".id").textContent);
  const search = document.getElementById("search");
  const show = () => {
    const wanted = search.value.trim().toLowerCase();
    const kind = controls.elements.kind.value;
    let shown = 0;
    lines.forEach((line, i) => {
      const found = /^\d+$/.test(wanted) ? numbers[i] === wanted : words[i].includes(wanted);
      line.hidden = !found || (kind !== "" && line.dataset.stable !== kind);
      if (!line.hidden) shown += 1;
    });
    document.getElementById("count").textContent = `${shown} of ${lines.length}`;
  };
  controls.addEventListener("input", show);
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.hidden = false;
  show();
}
