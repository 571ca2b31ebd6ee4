for (const svg of document.querySelectorAll("svg[data-hover]")) {
  const data = JSON.parse(svg.dataset.hover), figure = svg.closest("figure");
  const tip = figure.appendChild(document.createElement("div"));
  tip.className = "tip"; tip.hidden = true;
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  line.setAttribute("class", "cursor"); line.setAttribute("y1", 12); line.setAttribute("y2", 214);
  const say = v => data.unit == "%" ? (100 * v).toPrecision(3) + " %" : Number(v.toPrecision(4)).toLocaleString("en");
  const hide = () => { tip.hidden = true; line.remove() };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const y = (event.clientY - box.top) / box.height * svg.viewBox.baseVal.height;
    const far = p => Math.abs(p[2] - x) + Math.abs(p[3] - y) / 50;
    let at = null;
    for (const s of data.series) for (const p of s.points) if (at === null || far(p) < far(at)) at = p;
    if (at === null) return;
    line.setAttribute("x1", at[2]); line.setAttribute("x2", at[2]); svg.append(line);
    tip.replaceChildren();
    const head = tip.appendChild(document.createElement("b"));
    head.textContent = data.x + " " + Number(at[0].toPrecision(6)).toLocaleString("en");
    for (const s of data.series) {
      if (!s.points.length) continue;
      const gap = p => Math.abs(p[2] - at[2]) + Math.abs(p[3] - at[3]) / 50;
      const p = s.points.reduce((a, b) => gap(b) < gap(a) ? b : a);
      if (!s.name || Math.abs(p[2] - at[2]) > 4) continue;
      const row = tip.appendChild(document.createElement("div"));
      row.textContent = s.name + ": " + say(p[1]) + (p[4] ? " (" + p[4] + ")" : "");
    }
    tip.hidden = false;
    const home = figure.getBoundingClientRect(), left = box.left - home.left + at[2] / svg.viewBox.baseVal.width * box.width;
    tip.style.left = Math.max(4, Math.min(left + 12, home.width - tip.offsetWidth - 4)) + "px";
    tip.style.top = Math.max(4, event.clientY - home.top - tip.offsetHeight - 12) + "px";
  });
}
