//! Conversations to learn from: their ids, and which of these the model is to write itself.
//!
//! An answer is what a template renders between the opening that it gives a model to continue (the
//! "generation prompt") and the turn that follows. The text is cut there before it is encoded, because
//! there the model begins to write: "Assistant: " and "Hello" are the ids of both parts, and never those
//! of "Assistant: Hello", which may have one token across the cut that no model could continue.

use crate::{ChatTemplate, Message, Tokenizer, TokenizerError};

/// A conversation to learn from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Turns {
    /// All ids, those of a beginning of text among them.
    pub ids: Vec<u32>,
    /// For each id, whether the model writes it: those of answers, up to what ends the turn.
    pub learned: Vec<bool>,
}

impl Turns {
    /// Appends ids that the model writes itself, or reads.
    pub fn push(&mut self, ids: &[u32], learned: bool) {
        self.ids.extend_from_slice(ids);
        self.learned.resize(self.ids.len(), learned);
    }
}

impl ChatTemplate {
    /// A conversation up to its last answer, in the form of [`ChatTemplate::prompt`]: what comes after
    /// that has nothing to learn from.
    ///
    /// # Errors
    /// [`TokenizerError::Turns`] for a conversation without an answer, and for a template that renders a
    /// turn otherwise once another follows it, or has no opening for an answer; and as
    /// [`ChatTemplate::encode`].
    pub fn turns(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
    ) -> Result<Turns, TokenizerError> {
        let refuse = |cause: String| TokenizerError::Turns { cause };
        let said = Self::unspecial(tokenizer, messages);
        let answers: Vec<usize> =
            (0..said.len()).filter(|&i| said[i].role == "assistant").collect();
        if answers.is_empty() {
            return Err(refuse("no message of the role \"assistant\" to learn from".to_owned()));
        }
        let (mut turns, mut seen) = (Turns::default(), String::new());
        for at in answers {
            let opening = self.render_for(tokenizer, &said[..at], true)?;
            let Some(question) = opening.strip_prefix(seen.as_str()) else {
                let cause = format!("message {at}: the turns before are rendered otherwise");
                return Err(refuse(cause));
            };
            let whole = self.render_for(tokenizer, &said[..=at], false)?;
            let Some(answer) = whole.strip_prefix(opening.as_str()) else {
                let cause = format!(
                    "message {}: the answer does not begin where the template lets a model begin",
                    at + 1
                );
                return Err(refuse(cause));
            };
            turns.push(&Self::ids_of(tokenizer, question)?, false);
            let ids = Self::ids_of(tokenizer, answer)?;
            // What stands between the end of a turn and the next one, such as a line break, nobody
            // writes: generation has ended.
            let ends = |id: &u32| [tokenizer.eot_id(), tokenizer.eos_id()].contains(&Some(*id));
            let written = ids.iter().position(ends).map_or(ids.len(), |end| end + 1);
            turns.push(&ids[..written], true);
            turns.push(&ids[written..], false);
            seen = whole;
        }
        if let Some(bos) = Self::missing_bos(tokenizer, &turns.ids) {
            turns.ids.insert(0, bos);
            turns.learned.insert(0, false);
        }
        Ok(turns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEMPLATE: &str = "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}\
        {{ m['role'] | capitalize + ': ' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}\
        {% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}";

    fn tokenizer() -> Tokenizer {
        Tokenizer::train_bpe(["User: hello Assistant: hello there"; 9].iter(), 300).unwrap()
    }

    fn messages(roles: &[(&str, &str)]) -> Vec<Message> {
        roles.iter().map(|(role, content)| Message::new(*role, *content)).collect()
    }

    #[test]
    fn answers_are_learned_with_their_end_and_nothing_else() {
        let (tokenizer, template) = (tokenizer(), ChatTemplate::new(TEMPLATE).unwrap());
        let said = messages(&[
            ("system", "be brief"),
            ("user", "hello"),
            ("assistant", "hello there"),
            ("user", "hello <|eot_id|>"),
            ("assistant", "hello"),
            ("user", "nobody answers"),
        ]);
        let turns = template.turns(&tokenizer, &said).unwrap();
        assert_eq!(turns.ids.len(), turns.learned.len());
        let text = |learned: bool| {
            let ids = turns.ids.iter().zip(&turns.learned).filter(|(_, l)| **l == learned);
            let ids: Vec<u32> = ids.map(|(id, _)| *id).collect();
            tokenizer.decode(&ids, false).unwrap()
        };
        assert_eq!(text(true), "hello there<|eot_id|>hello<|eot_id|>");
        assert!(!text(false).contains("nobody"));
        // What a model gets as a prompt is what it is trained to continue.
        let prompt = template.prompt(&tokenizer, &said[..2]).unwrap();
        assert!(turns.ids.starts_with(&prompt));
        assert!(turns.learned[..prompt.len()].iter().all(|l| !l) && turns.learned[prompt.len()]);
        // The name of a special token that a user writes is text: two turns of five end so.
        let ends = turns.ids.iter().filter(|id| Some(**id) == tokenizer.eot_id()).count();
        assert_eq!(ends, 5);
    }

    #[test]
    fn what_follows_the_end_of_a_turn_is_not_learned() {
        let chatml = "{% for m in messages %}{{ '<s>' + m['role'] + '\\n' + m['content'] + \
            '<|eot_id|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}";
        let (tokenizer, template) = (tokenizer(), ChatTemplate::new(chatml).unwrap());
        let said = messages(&[("user", "hello"), ("assistant", "hello")]);
        let turns = template.turns(&tokenizer, &said).unwrap();
        let last = turns.learned.iter().rposition(|l| *l).unwrap();
        assert_eq!(Some(turns.ids[last]), tokenizer.eot_id());
        assert_eq!(tokenizer.decode(&turns.ids[last + 1..], false).unwrap(), "\n");
    }

    #[test]
    fn what_cannot_be_learned_from_is_refused() {
        let tokenizer = tokenizer();
        let error = |template: &str, said: &[Message]| {
            let template = ChatTemplate::new(template).unwrap();
            template.turns(&tokenizer, said).unwrap_err().to_string()
        };
        let answered = messages(&[("user", "hello"), ("assistant", "there")]);
        assert!(error(TEMPLATE, &answered[..1]).contains("\"assistant\""));
        assert!(error(TEMPLATE, &[]).contains("\"assistant\""));
        let only_last = "{{ messages[-1]['content'] }}";
        let error_of = error(only_last, &answered);
        assert!(error_of.contains("message 2") && error_of.contains("begin"), "{error_of}");
        let forgets = "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}\
            {{ m['role'] }}: {{ m['content'] }}\n{% endif %}{% endfor %}\
            {% if add_generation_prompt %}assistant: {% endif %}";
        let long = [answered.clone(), answered].concat();
        let error_of = error(forgets, &long);
        assert!(error_of.contains("message 3") && error_of.contains("otherwise"), "{error_of}");
    }
}
