// Markdown to nodes: paragraphs, headings, lists, quotes, code, emphasis.
//
// What a model wrote becomes text nodes and nothing else: there is no innerHTML here, no links and no
// images, so that no answer can run, load or open anything.

const INLINE = /(`+)([^`]|[^`].*?[^`])\1(?!`)|\*\*(\S(?:.*?\S)?)\*\*|\*(\S(?:.*?\S)?)\*/s;

function inline(parent, text) {
  let rest = text;
  for (let found; (found = INLINE.exec(rest)); ) {
    parent.append(rest.slice(0, found.index));
    const [whole, , code, strong, em] = found;
    const node = document.createElement(code !== undefined ? 'code' : strong !== undefined ? 'strong' : 'em');
    if (code !== undefined) node.textContent = code;
    else inline(node, strong ?? em);
    parent.append(node);
    rest = rest.slice(found.index + whole.length);
  }
  parent.append(rest);
}

const FENCE = /^\s*(```+|~~~+)\s*(\S*)/;
const HEADING = /^(#{1,6})\s+(.*)/;
const RULE = /^\s*([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^\s*(?:([-*+])|(\d{1,9})[.)])\s+(.*)/;
const QUOTE = /^\s*>\s?(.*)/;
const startsBlock = (line) => [FENCE, HEADING, RULE, ITEM, QUOTE].some((kind) => kind.test(line));

/** Appends the blocks of `text` to `parent`; `depth` bounds quotes in quotes. */
function blocks(parent, text, depth) {
  const lines = text.split('\n');
  const add = (tag) => parent.appendChild(document.createElement(tag));
  for (let i = 0; i < lines.length; ) {
    const line = lines[i];
    let found;
    if (!line.trim()) {
      i += 1;
    } else if ((found = FENCE.exec(line))) {
      const code = [];
      for (i += 1; i < lines.length && !lines[i].trim().startsWith(found[1]); i += 1) code.push(lines[i]);
      i += 1;
      add('pre').appendChild(document.createElement('code')).textContent = code.join('\n');
    } else if ((found = HEADING.exec(line))) {
      inline(add('h' + Math.min(4, found[1].length + 1)), found[2]);
      i += 1;
    } else if (RULE.test(line)) {
      add('hr');
      i += 1;
    } else if ((found = ITEM.exec(line))) {
      const ordered = found[2] !== undefined;
      const list = add(ordered ? 'ol' : 'ul');
      if (ordered) list.start = Number(found[2]);
      while (i < lines.length && (found = ITEM.exec(lines[i])) && (found[2] !== undefined) === ordered) {
        let item = found[3];
        for (i += 1; i < lines.length && lines[i].trim() && !startsBlock(lines[i]); i += 1) item += '\n' + lines[i].trim();
        inline(list.appendChild(document.createElement('li')), item);
      }
    } else if (depth < 8 && QUOTE.test(line)) {
      const quoted = [];
      for (; i < lines.length && (found = QUOTE.exec(lines[i])); i += 1) quoted.push(found[1]);
      blocks(add('blockquote'), quoted.join('\n'), depth + 1);
    } else {
      const paragraph = [line];
      for (i += 1; i < lines.length && lines[i].trim() && !startsBlock(lines[i]); i += 1) paragraph.push(lines[i]);
      inline(add('p'), paragraph.join('\n'));
    }
  }
}

/** Shows `text` in `parent`, in place of what is there. */
export function show(parent, text) {
  parent.replaceChildren();
  blocks(parent, text, 0);
}
