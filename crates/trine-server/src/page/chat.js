// The chat page: a conversation kept in this browser, streamed from the server it came from.

import { show } from './markdown.js';

const $ = (id) => document.getElementById(id);
const DEFAULTS = { temperature: 0.7, top_p: 0.95, top_k: 0, min_p: 0, repetition_penalty: 1, max_tokens: 512 };
const NUMBERS = [...Object.keys(DEFAULTS), 'seed'];

/** {role, content, note?, error?} */
let messages = [];
let model = null;
/** Ends the answer that is being written; null when there is none. */
let running = null;

const store = {
  read(key, otherwise) {
    try { return JSON.parse(localStorage.getItem('trine.' + key)) ?? otherwise; } catch { return otherwise; }
  },
  write(key, value) {
    // A full or forbidden store loses what is kept, not what is shown.
    try { localStorage.setItem('trine.' + key, JSON.stringify(value)); } catch { /* not kept */ }
  },
};

// Settings

const settings = { ...DEFAULTS, system: '', ...store.read('settings', {}) };
for (const id of [...NUMBERS, 'system']) {
  $(id).value = settings[id] ?? '';
  $(id).addEventListener('change', () => {
    settings[id] = $(id).value;
    store.write('settings', settings);
  });
}
// A key lasts as long as the tab.
$('key').value = sessionStorage.getItem('trine.key') ?? '';
$('key').addEventListener('change', () => {
  sessionStorage.setItem('trine.key', $('key').value);
  describe();
});
$('settings').addEventListener('submit', (event) => event.preventDefault());
$('open').addEventListener('click', () => {
  $('settings').hidden = !$('settings').hidden;
  $('open').setAttribute('aria-expanded', String(!$('settings').hidden));
});

function headers() {
  const key = $('key').value.trim();
  return { 'Content-Type': 'application/json', ...(key && { Authorization: 'Bearer ' + key }) };
}

function sampling() {
  const numbers = NUMBERS.filter((id) => $(id).value !== '' && Number.isFinite(Number($(id).value)));
  return Object.fromEntries(numbers.map((id) => [id, Number($(id).value)]));
}

// The conversation

function element(message, index) {
  const article = document.createElement('article');
  article.className = message.role;
  const content = article.appendChild(document.createElement('div'));
  const body = content.appendChild(document.createElement('div'));
  content.className = message.role === 'user' ? '' : 'answer';
  body.className = 'body';
  show(body, message.content);
  if (message.error) {
    const error = content.appendChild(document.createElement('p'));
    error.className = 'wrong';
    error.textContent = message.error;
  }
  if (message.role === 'assistant' && !(running && index === messages.length - 1)) {
    const meta = content.appendChild(document.createElement('div'));
    meta.className = 'meta';
    const button = (label, action) => {
      const node = meta.appendChild(document.createElement('button'));
      node.type = 'button';
      node.textContent = label;
      node.addEventListener('click', action);
    };
    button('Copy', () => navigator.clipboard?.writeText(message.content));
    if (index === messages.length - 1) button('Regenerate', () => { messages.pop(); answer(); });
    if (message.note) meta.append(message.note);
  }
  if (running && index === messages.length - 1) article.classList.add('waiting');
  return article;
}

function draw() {
  $('talk').replaceChildren(...messages.map(element));
  if (!messages.length) $('talk').append(empty);
  $('talk').scrollTop = $('talk').scrollHeight;
  $('send').textContent = running ? 'Stop' : 'Send';
}
const empty = $('empty');

/** Redraws the answer that is being written, and follows it unless somebody scrolled up. */
function drawLast() {
  const talk = $('talk');
  const follows = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 80;
  show(talk.lastElementChild.querySelector('.body'), messages.at(-1).content);
  if (follows) talk.scrollTop = talk.scrollHeight;
}

/** The events of a response, as they arrive. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split('\n\n');
    rest = parts.pop();
    for (const part of parts) if (part.startsWith('data: ')) yield part.slice(6);
  }
}

async function answer() {
  const system = $('system').value.trim();
  const turns = messages.filter((message) => message.content).map(({ role, content }) => ({ role, content }));
  if (system) turns.unshift({ role: 'system', content: system });
  const message = { role: 'assistant', content: '' };
  messages.push(message);
  running = new AbortController();
  draw();
  const sent = performance.now();
  let first = null, last = null, usage = null, ended = false, queued = false;
  const redraw = () => { queued = false; if (messages.at(-1) === message && running) drawLast(); };
  try {
    const response = await fetch('v1/chat/completions', {
      method: 'POST',
      headers: headers(),
      signal: running.signal,
      body: JSON.stringify({ ...sampling(), model: model ?? undefined, messages: turns, stream: true, stream_options: { include_usage: true } }),
    });
    if (!response.ok) {
      const body = await response.json().catch(() => null);
      throw new Error(body?.error?.message ?? `The server answered ${response.status}.`);
    }
    for await (const data of events(response)) {
      if (data === '[DONE]') { ended = true; break; }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      usage = chunk.usage ?? usage;
      const text = chunk.choices[0]?.delta?.content;
      if (text) {
        last = performance.now();
        first ??= last;
        message.content += text;
        if (!queued) { queued = true; requestAnimationFrame(redraw); }
      }
    }
    if (!ended) throw new Error('The connection ended before the answer did.');
  } catch (error) {
    const stopped = error.name === 'AbortError';
    if (!stopped) message.error = error instanceof TypeError ? 'The server cannot be reached.' : error.message;
    message.note = stopped ? 'stopped' : '';
  }
  if (usage && first !== null) {
    const rate = usage.completion_tokens > 1 ? (1000 * (usage.completion_tokens - 1)) / Math.max(1, last - first) : 0;
    message.note = `${usage.completion_tokens} tokens, ${rate.toFixed(1)} tok/s, first after ${((first - sent) / 1000).toFixed(2)} s`;
  }
  running = null;
  store.write('messages', messages);
  draw();
  health();
}

// What the server says of itself

function choose(name) {
  model = name;
  $('model').textContent = name;
  $('models').value = name;
  document.title = `${name} · Trine`;
}
$('models').addEventListener('change', () => {
  choose($('models').value);
  store.write('model', model);
});

async function describe() {
  try {
    const response = await fetch('v1/models', { headers: headers() });
    if (response.status === 401) {
      $('status').textContent = 'This server wants an API key: see Settings.';
      return;
    }
    const names = (await response.json()).data.map(({ id }) => id);
    // Adapters are models too; who has chosen one finds it chosen.
    const chosen = store.read('model', null);
    const options = names.map((name) => Object.assign(document.createElement('option'), { value: name, textContent: name }));
    $('models').replaceChildren(...options);
    $('models').hidden = names.length < 2;
    $('model').hidden = names.length > 1;
    choose(names.includes(chosen) ? chosen : names[0]);
  } catch { /* health says it */ }
}

async function health() {
  try {
    const state = await (await fetch('health')).json();
    const mb = (bytes) => `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB`;
    const load = state.running + state.waiting ? `${state.running} running, ${state.waiting} waiting, ` : '';
    if (model || !state.needs_key) $('status').textContent = `${load}context memory ${mb(state.kv_bytes)} of ${mb(state.kv_bytes_limit)}`;
  } catch {
    $('status').textContent = 'The server cannot be reached.';
  }
}

// Input

function fit() {
  $('input').style.height = 'auto';
  $('input').style.height = `${$('input').scrollHeight + 2}px`;
}

$('form').addEventListener('submit', (event) => {
  event.preventDefault();
  if (running) return running.abort();
  const content = $('input').value.trim();
  if (!content) return;
  $('input').value = '';
  fit();
  messages.push({ role: 'user', content });
  store.write('messages', messages);
  answer();
});
$('input').addEventListener('input', fit);
$('input').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) $('form').requestSubmit();
  }
});
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape') running?.abort();
});
$('new').addEventListener('click', () => {
  running?.abort();
  messages = [];
  store.write('messages', messages);
  draw();
  $('input').focus();
});
$('export').addEventListener('click', () => {
  const text = JSON.stringify({ model, settings, messages }, null, 2);
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], { type: 'application/json' }));
  link.download = 'conversation.json';
  link.click();
  URL.revokeObjectURL(link.href);
});

messages = store.read('messages', []);
draw();
describe().then(health);
setInterval(() => document.hidden || health(), 5000);
