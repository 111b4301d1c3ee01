// Asks for the page again every few seconds and swaps the sections that changed. What is open,
// focused or scrolled stays so. Times are told as ages; nothing is loaded from elsewhere.
"use strict";
const EVERY_MS = 2000;
const words = document.getElementById("live-words");
const badge = document.getElementById("live");
let tag = null;
let lost = 0;

function span(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return minutes % 60 ? `${hours} h ${minutes % 60} min` : `${hours} h`;
  return `${Math.floor(hours / 24)} d`;
}

function age(seconds) {
  if (seconds < 5) return "just now";
  const hours = Math.round(seconds / 3600);
  return `${seconds < 10800 || hours >= 48 ? span(seconds) : `${hours} h`} ago`;
}

function tellTimes() {
  for (const time of document.querySelectorAll("time")) {
    const at = new Date(time.dateTime);
    const seconds = (Date.now() - at) / 1000;
    if (!time.title) time.title = at.toLocaleString();
    if ("ago" in time.dataset) time.textContent = age(seconds);
    if ("for" in time.dataset) time.textContent = span(seconds);
  }
}

function keep(section) {
  const focused = document.activeElement;
  return {
    open: [...section.querySelectorAll("details[open]")].map((d) => d.id),
    scrolled: [...section.querySelectorAll(".scroll, .sideways")].map((s) => [s.scrollLeft, s.scrollTop]),
    focus: section.contains(focused) ? [...section.querySelectorAll("summary, a, .scroll, .sideways")].indexOf(focused) : -1,
  };
}

function restore(section, kept) {
  for (const id of kept.open) {
    const details = document.getElementById(id);
    if (details) details.open = true;
  }
  section.querySelectorAll(".scroll, .sideways").forEach((s, i) => {
    if (kept.scrolled[i]) [s.scrollLeft, s.scrollTop] = kept.scrolled[i];
  });
  if (kept.focus >= 0) section.querySelectorAll("summary, a, .scroll, .sideways")[kept.focus]?.focus({ preventScroll: true });
}

const seen = new Map();
for (const section of document.querySelectorAll("[data-live]")) seen.set(section.id, section.innerHTML);

function take(html) {
  const page = new DOMParser().parseFromString(html, "text/html");
  if (!page.getElementById("main")) return location.reload();
  const before = document.title;
  document.title = page.title;
  const fresh = [...page.querySelectorAll("[data-live]")];
  if (fresh.length !== seen.size) return location.reload();
  for (const section of fresh) {
    const old = document.getElementById(section.id);
    if (!old || seen.get(section.id) === section.innerHTML) continue;
    seen.set(section.id, section.innerHTML);
    const kept = keep(old);
    old.replaceChildren(...document.importNode(section, true).childNodes);
    restore(old, kept);
  }
  if (before !== page.title) tell(page.getElementById("headline").textContent);
}

function tell(text) {
  document.getElementById("told").textContent = text;
}

function show(state, text) {
  if (badge.dataset.state === state) return;
  badge.dataset.state = state;
  words.textContent = text;
  if (state === "lost") tell(text);
}

async function ask() {
  try {
    const answer = await fetch("/", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store", redirect: "manual" });
    if (answer.type === "opaqueredirect") return location.reload();
    if (answer.ok) {
      tag = answer.headers.get("ETag");
      take(await answer.text());
    } else if (answer.status !== 304) throw new Error(answer.status);
    show("live", "Live");
    lost = 0;
  } catch {
    lost += 1;
    show("lost", "No connection: what you see is old");
  }
}

async function follow() {
  if (!document.hidden) await ask();
  tellTimes();
  setTimeout(follow, lost ? Math.min(30000, EVERY_MS * 2 ** lost) : EVERY_MS);
}

document.addEventListener("visibilitychange", () => { if (!document.hidden) ask().then(tellTimes); });
tellTimes();
setInterval(tellTimes, 1000);
follow();
