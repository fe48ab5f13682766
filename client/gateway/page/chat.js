// The chat: one conversation, streamed from /v1/chat/completions as any client of the API would.
"use strict";

const EXAMPLES = ["What is Mistral NeMo?", "What is Tekken?", "How big is the KV cache per token?"];
const element = (id) => document.getElementById(id);
let turns = []; // a new array for every state; a new chat begins with a new one
let running = null; // the AbortController of the answer that is coming

function addMessage(role, text) {
  element("empty").hidden = true;
  const message = document.createElement("div");
  message.className = `message ${role}`;
  const speaker = document.createElement("span");
  speaker.className = "hidden";
  speaker.textContent = role === "user" ? "You: " : "Model: ";
  const body = document.createElement("div");
  body.className = "body";
  body.textContent = text;
  message.append(speaker, body);
  if (role === "assistant") {
    const meta = document.createElement("div");
    meta.className = "meta";
    message.append(meta);
  }
  element("log").append(message);
  scrollDown();
  return message;
}

function scrollDown() {
  element("log").scrollTop = element("log").scrollHeight;
}

function request(messages) {
  const number = (id) => (element(id).value === "" ? null : Number(element(id).value));
  const system = element("system").value.trim();
  const body = {
    model: element("model").value || "mistral-nemo",
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    stream: true,
    stream_options: { include_usage: true },
    temperature: number("temperature"),
    top_p: number("top_p"),
    top_k: number("top_k"),
    max_tokens: number("max_tokens"),
    seed: number("seed"),
  };
  return Object.fromEntries(Object.entries(body).filter(([, value]) => value !== null));
}

function headers() {
  const key = element("key").value.trim();
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

// The events of a response, each parsed.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function ask(question) {
  const before = turns;
  const messages = [...before, { role: "user", content: question }];
  addMessage("user", question);
  const message = addMessage("assistant", "");
  const body = message.querySelector(".body");
  const meta = message.querySelector(".meta");
  message.classList.add("running");
  running = new AbortController();
  showRunning(true);
  const started = performance.now();
  let firstToken = 0;
  let usage = null;
  let reason = "";
  let problem = "";
  const keep = () => {
    if (turns === before) turns = [...messages, { role: "assistant", content: body.textContent }];
  };
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(request(messages)), signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage || usage;
      for (const choice of event.choices) {
        firstToken ||= performance.now();
        const log = element("log");
        const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
        body.textContent += choice.delta.content || "";
        reason = choice.finish_reason || reason;
        if (isAtEnd) scrollDown();
      }
    }
    keep();
  } catch (error) {
    problem = error.name === "AbortError" ? "" : error.message;
    reason = "stopped";
    if (!problem && body.textContent) keep();
  }
  message.classList.remove("running");
  running = null;
  showRunning(false);
  if (problem) {
    meta.classList.add("error");
    meta.textContent = problem;
  } else {
    meta.textContent = summary(usage, reason, firstToken - started, performance.now() - firstToken);
  }
  scrollDown();
}

function summary(usage, reason, firstMs, restMs) {
  if (!usage) return reason;
  const cached = usage.prompt_tokens_details.cached_tokens;
  const speed = usage.completion_tokens > 1 ? `, ${((usage.completion_tokens - 1) / (restMs / 1000)).toFixed(0)} tokens/s` : "";
  const why = reason === "length" ? ", cut at the most tokens" : "";
  return `${usage.prompt_tokens} prompt tokens${cached ? ` (${cached} cached)` : ""}, ${usage.completion_tokens} answer tokens` +
    `, first after ${firstMs.toFixed(0)} ms${speed}${why}`;
}

function showRunning(isRunning) {
  element("stop").hidden = !isRunning;
  element("send").hidden = isRunning;
  // The button that had the focus is gone: the next thing to do is to type.
  element("question").focus();
}

function send() {
  const question = element("question").value.trim();
  if (!question || running) return;
  element("question").value = "";
  fit();
  ask(question);
}

function fit() {
  const area = element("question");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

async function listModels() {
  const response = await fetch("/v1/models", { headers: headers() }).catch(() => null);
  const names = response?.ok ? (await response.json()).data.map((model) => model.id) : [];
  element("model").replaceChildren(...names.map((name) => new Option(name, name)));
  if (response?.status === 401) element("settings").open = true;
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

function start() {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  setTheme(localStorage.getItem("theme") || (dark.matches ? "dark" : "light"));
  dark.addEventListener("change", () => localStorage.getItem("theme") || setTheme(dark.matches ? "dark" : "light"));
  element("theme").addEventListener("click", () => {
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    localStorage.setItem("theme", document.documentElement.dataset.theme);
  });
  element("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  element("question").addEventListener("input", fit);
  element("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
  element("stop").addEventListener("click", () => running?.abort());
  element("clear").addEventListener("click", () => {
    running?.abort();
    turns = [];
    element("log").replaceChildren(element("empty"));
    element("empty").hidden = false;
    element("question").focus();
  });
  element("key").addEventListener("change", listModels);
  for (const example of EXAMPLES) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = example;
    button.addEventListener("click", () => { if (!running) ask(example); });
    element("examples").append(button);
  }
  listModels();
}

start();
