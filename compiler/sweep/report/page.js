// Conveniences only: the page says everything without them.
(() => {
  "use strict";
  const tip = document.createElement("div");
  tip.className = "tooltip";
  tip.hidden = true;
  document.body.append(tip);

  // One tooltip that comes at once, instead of the browser's that comes late.
  for (const title of document.querySelectorAll("svg title")) {
    title.parentNode.dataset.tip = title.textContent;
    title.remove();
  }
  const show = (event) => {
    const mark = event.target.closest ? event.target.closest("[data-tip]") : null;
    tip.hidden = !mark;
    if (!mark) return;
    tip.textContent = mark.dataset.tip;
    const box = tip.getBoundingClientRect();
    const x = Math.min(event.clientX + 14, window.innerWidth - box.width - 8);
    const above = event.clientY - box.height - 14;
    tip.style.left = Math.max(8, x) + "px";
    tip.style.top = (above > 8 ? above : event.clientY + 18) + "px";
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });

  // Pointing at a method in the list dims the others in the chart.
  const series = document.querySelectorAll(".main .series");
  const choose = (css) => {
    for (const one of series) one.classList.toggle("dim", css !== "" && !one.classList.contains(css));
  };
  for (const row of document.querySelectorAll("[data-method]")) {
    row.addEventListener("pointerenter", () => choose(row.dataset.method));
    row.addEventListener("pointerleave", () => choose(""));
  }
})();
