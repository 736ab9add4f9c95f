//! From the text of an answer to what it says and the calls it makes, piece by piece.

use trine_tokenizer::CallFormat;

/// Something new of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Delta {
    /// Words.
    Text(String),
    /// A call begins: that of a function.
    Call(String),
    /// Arguments of the last call go on.
    Arguments(String),
}

/// Where in an answer a reader is.
#[derive(Clone, Copy, Debug)]
enum State {
    /// In words, which may turn into a call.
    Words,
    /// In what calls begin with.
    Open,
    Name,
    /// In arguments: how deep, whether in a string, and whether after a backslash.
    Arguments {
        depth: usize,
        string: bool,
        escaped: bool,
    },
    /// After arguments.
    After,
    /// Nothing can be called any more; whether what comes is words.
    Over {
        words: bool,
    },
}

/// Finds calls in a text that arrives in pieces.
pub(crate) struct CallReader {
    format: CallFormat,
    state: State,
    /// What is not yet certain.
    held: String,
    called: bool,
}

impl CallReader {
    pub(crate) fn new(format: CallFormat) -> Self {
        Self { format, state: State::Words, held: String::new(), called: false }
    }

    /// Whether there were calls, the last of which is whole.
    pub(crate) fn has_called(&self) -> bool {
        let whole = matches!(self.state, State::After | State::Over { words: false });
        whole && self.called
    }

    /// Takes the next piece.
    pub(crate) fn push(&mut self, piece: &str) -> Vec<Delta> {
        self.held.push_str(piece);
        let mut deltas = Vec::new();
        while self.step(&mut deltas) {}
        deltas
    }

    /// What was held back when the text ends. A call whose name is not whole is none.
    pub(crate) fn finish(&mut self) -> Vec<Delta> {
        let held = std::mem::take(&mut self.held);
        match self.state {
            State::Words if !held.is_empty() => vec![Delta::Text(held)],
            _ => Vec::new(),
        }
    }

    /// Goes on where more is certain.
    fn step(&mut self, deltas: &mut Vec<Delta>) -> bool {
        match self.state {
            State::Words => self.words(deltas),
            State::Open => {
                let open = self.format.open.trim_start();
                match starts(&self.held, open) {
                    None => false,
                    Some(true) => self.enter(State::Name, open.len()),
                    Some(false) => self.enter(State::Over { words: true }, 0),
                }
            }
            State::Name => match self.held.find(&self.format.middle) {
                None => false,
                Some(at) => {
                    deltas.push(Delta::Call(self.held[..at].to_owned()));
                    self.called = true;
                    let begin = State::Arguments { depth: 0, string: false, escaped: false };
                    self.enter(begin, at + self.format.middle.len())
                }
            },
            State::Arguments { .. } => self.arguments(deltas),
            State::After => self.after(),
            State::Over { words } => {
                let held = std::mem::take(&mut self.held);
                if words && !held.is_empty() {
                    deltas.push(Delta::Text(held));
                }
                false
            }
        }
    }

    fn drop_blanks(&mut self) {
        let blanks = self.held.len() - self.held.trim_start().len();
        self.held.drain(..blanks);
    }

    fn enter(&mut self, state: State, bytes: usize) -> bool {
        self.held.drain(..bytes);
        self.state = state;
        true
    }

    /// Words are certain up to what may be the beginning of a call, and blanks before it.
    fn words(&mut self, deltas: &mut Vec<Delta>) -> bool {
        let Some(tag) = self.format.tag() else {
            // Calls have no tag: only what begins like one is one.
            let blanks = self.held.len() - self.held.trim_start().len();
            return match starts(&self.held[blanks..], self.format.open.trim_start()) {
                None => false,
                Some(true) => self.enter(State::Open, blanks),
                Some(false) => self.enter(State::Over { words: true }, 0),
            };
        };
        let found = self.held.find(tag);
        let partial = || {
            let begins = |at: &usize| tag.starts_with(&self.held[*at..]);
            let places = self.held.char_indices().map(|(at, _)| at);
            places.filter(begins).min().unwrap_or(self.held.len())
        };
        let certain = self.held[..found.unwrap_or_else(partial)].trim_end().len();
        let words: String = self.held.drain(..certain).collect();
        if certain > 0 {
            deltas.push(Delta::Text(words));
        }
        found.is_some() && {
            self.drop_blanks();
            self.enter(State::Open, 0)
        }
    }

    fn arguments(&mut self, deltas: &mut Vec<Delta>) -> bool {
        let State::Arguments { mut depth, mut string, mut escaped } = self.state else {
            return false;
        };
        if depth == 0 {
            self.drop_blanks();
        }
        let mut end = None;
        for (at, byte) in self.held.bytes().enumerate() {
            match byte {
                _ if escaped => escaped = false,
                b'\\' if string => escaped = true,
                b'"' => string = !string,
                b'{' | b'[' if !string => depth += 1,
                b'}' | b']' if !string => depth = depth.saturating_sub(1),
                _ => continue,
            }
            if depth == 0 && !string && matches!(byte, b'}' | b']') {
                end = Some(at + 1);
                break;
            }
        }
        let text: String = self.held.drain(..end.unwrap_or(self.held.len())).collect();
        if !text.is_empty() {
            deltas.push(Delta::Arguments(text));
        }
        self.state = match end {
            Some(_) => State::After,
            None => State::Arguments { depth, string, escaped },
        };
        end.is_some()
    }

    /// Another call, or the end.
    fn after(&mut self) -> bool {
        self.drop_blanks();
        let between = self.format.between.as_deref().map(str::trim_start);
        match between.map(|between| (starts(&self.held, between), between.len())) {
            Some((Some(true), len)) => self.enter(State::Name, len),
            Some((None, _)) => false,
            _ => self.enter(State::Over { words: false }, 0),
        }
    }
}

/// Whether a text starts with another; `None` while that may still be.
fn starts(text: &str, with: &str) -> Option<bool> {
    match text.len() < with.len() && with.starts_with(text) {
        true => None,
        false => Some(text.starts_with(with)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::form::testing::bare;
    use super::*;

    /// What is read of a text in pieces of every length: words, and calls with their arguments.
    #[track_caller]
    fn check(format: &CallFormat, text: &str, words: &str, calls: &[(&str, &str)]) {
        let whole = calls.last().is_some_and(|(_, arguments)| arguments.ends_with('}'));
        let characters: Vec<char> = text.chars().collect();
        for size in 1..=characters.len().max(1) {
            let mut reader = CallReader::new(format.clone());
            let mut deltas = Vec::new();
            for piece in characters.chunks(size) {
                deltas.extend(reader.push(&String::from_iter(piece)));
            }
            deltas.extend(reader.finish());
            let (mut said, mut called) = (String::new(), Vec::new());
            for delta in deltas {
                match delta {
                    Delta::Text(text) => said += &text,
                    Delta::Call(name) => called.push((name, String::new())),
                    Delta::Arguments(text) => called.last_mut().unwrap().1 += &text,
                }
            }
            let called: Vec<_> = called.iter().map(|(name, a)| (&name[..], &a[..])).collect();
            assert_eq!((&said[..], &called[..]), (words, calls), "pieces of {size}");
            assert_eq!(reader.has_called(), whole);
        }
    }

    #[test]
    fn words_stay_words() {
        let hermes = CallFormat::hermes();
        for text in ["", "a", "a <tool_ b < c", "a <tool_call", "a \n\n", "{\"name\": \"f\"}"] {
            check(&hermes, text, text, &[]);
        }
        for text in ["", "  ", "{\"name\"", "{\"names\": 1}", "so: {\"name\": \"f\"", "é"] {
            check(&bare(), text, text, &[]);
        }
        check(&hermes, "<tool_call> what?", "<tool_call> what?", &[]);
    }

    #[test]
    fn calls_are_read_with_words_before_them() {
        let call = |name: &str, arguments: &str| {
            format!(
                "<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {arguments}}}\n</tool_call>"
            )
        };
        let hermes = CallFormat::hermes();
        let nested = r#"{"a": "}\"]{", "b": [{}, "\\"]}"#;
        let text = format!("Let me see.\n\n{}", call("f", nested));
        check(&hermes, &text, "Let me see.", &[("f", nested)]);
        let two = format!("{}\n{}", call("f", "{}"), call("g", "{\"ä\": 1}"));
        check(&hermes, &two, "", &[("f", "{}"), ("g", "{\"ä\": 1}")]);
        let bare_text = "\n{\"name\": \"f\", \"parameters\": {\"x\": 1} }";
        check(&bare(), bare_text, "", &[("f", "{\"x\": 1}")]);
    }

    #[test]
    fn calls_that_are_cut_off_are_as_far_as_they_came() {
        let hermes = CallFormat::hermes();
        check(&hermes, "<tool_call>\n{\"name\": \"f", "", &[]);
        let text = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": \"y";
        check(&hermes, text, "", &[("f", "{\"x\": \"y")]);
        let text = "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_";
        check(&hermes, text, "", &[("f", "{}")]);
    }
}
