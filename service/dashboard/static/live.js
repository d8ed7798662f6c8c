// Fetches the page's live part again while there is something to see, and draws the figures that it bears.
"use strict";

const PERIOD_MS = 1000;
const SLOW_PERIOD_MS = 10000;

function draw(live) {
  for (const table of live.querySelectorAll("[data-figure]")) {
    const place = document.getElementById(table.dataset.plot);
    if (!place || place.dataset.drawn === table.dataset.figure) continue;
    const figure = JSON.parse(table.dataset.figure);
    Plotly.react(place, figure.data, figure.layout, { responsive: true, displaylogo: false });
    place.dataset.drawn = table.dataset.figure;
  }
}

function isOver(live) {
  const facts = live.querySelector("[data-state]");
  return facts !== null && ["completed", "failed"].includes(facts.dataset.state);
}

async function refresh(live) {
  let period = PERIOD_MS;
  if (document.hidden) {
    setTimeout(() => refresh(live), period);
    return;
  }
  try {
    const answer = await fetch(live.dataset.live);
    if (answer.ok) {
      live.innerHTML = await answer.text();
      draw(live);
    }
    live.classList.toggle("stale", !answer.ok);
  } catch (error) {
    live.classList.add("stale");
    period = SLOW_PERIOD_MS;
  }
  if (!isOver(live)) setTimeout(() => refresh(live), period);
}

document.addEventListener("DOMContentLoaded", () => {
  const live = document.getElementById("live");
  if (live === null) return;
  draw(live);
  if (!isOver(live)) setTimeout(() => refresh(live), PERIOD_MS);
});
