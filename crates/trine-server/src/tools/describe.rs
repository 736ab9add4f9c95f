//! Conversations about tools for templates that know nothing of them: everything is said in words.
//!
//! The tools stand in the system message, or before the first question where the template has no system
//! messages; calls are part of what the assistant says, and results part of what the user says. The form
//! is that of Hermes, which models may have met in whatever they were trained on. How well a model that was
//! not trained for it makes use of tools is another matter: that its calls are well-formed is not.

use serde_json::Value;
use trine_tokenizer::{Call, CallFormat, ChatTemplate, Message, spaced_json};

/// A conversation in which nothing is left but texts of the roles "system", "user" and "assistant".
pub(crate) fn described(
    template: &ChatTemplate,
    messages: Vec<Message>,
    tools: &[Value],
) -> Vec<Message> {
    let mut said: Vec<Message> = Vec::new();
    let mut answers = false;
    for message in messages {
        let result = message.role == "tool";
        match said.last_mut() {
            // Several results are one turn of the user's.
            Some(last) if result && answers => last.content += &format!("\n{}", response(&message)),
            _ if result => said.push(Message::new("user", response(&message))),
            _ => said.push(in_words(message)),
        }
        answers = result;
    }
    if tools.is_empty() {
        return said;
    }
    let tools = instructions(tools);
    let system = takes_system(template);
    let role = if system { "system" } else { "user" };
    match said.iter().position(|message| message.role == role) {
        // Of a system message what was there comes first; of a question what is asked comes last.
        Some(at) if system => said[at].content += &format!("\n\n{tools}"),
        Some(at) => said[at].content.insert_str(0, &format!("{tools}\n\n")),
        None => said.insert(0, Message::new(role, tools)),
    }
    said
}

fn instructions(tools: &[Value]) -> String {
    let tools: Vec<String> = tools.iter().map(spaced_json).collect();
    format!(
        "You may call these functions, one JSON object a line:\n<tools>\n{}\n</tools>\nTo call one, answer with \
         its name and arguments:\n<tool_call>\n{{\"name\": \"NAME\", \"arguments\": {{...}}}}\n</tool_call>\n\
         What it returns follows in <tool_response>.",
        tools.join("\n")
    )
}

fn response(message: &Message) -> String {
    format!("<tool_response>\n{}\n</tool_response>", message.content)
}

/// A message whose calls are part of its text.
fn in_words(message: Message) -> Message {
    if message.tool_calls.is_empty() {
        return message;
    }
    let CallFormat { open, middle, close, .. } = CallFormat::hermes();
    let call = |Call { name, arguments, .. }: &Call| {
        let arguments = spaced_json(&Value::Object(arguments.clone()));
        format!("{open}{name}{middle}{arguments}{close}")
    };
    let words = Some(message.content).filter(|content| !content.is_empty());
    let parts: Vec<String> = words.into_iter().chain(message.tool_calls.iter().map(call)).collect();
    Message::new(message.role, parts.join("\n"))
}

/// Whether the template shows a system message to the model.
fn takes_system(template: &ChatTemplate) -> bool {
    let words = "system words";
    let messages = [Message::new("system", words), Message::new("user", "question")];
    template.render(&messages, true, "", "").is_ok_and(|text| text.contains(words))
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::*;

    fn conversation(template: &str) -> Vec<(String, String)> {
        let call = |name: &str| Call {
            id: String::new(),
            name: name.to_owned(),
            arguments: Map::from_iter([("x".to_owned(), json!(1))]),
        };
        let calls = vec![call("f"), call("g")];
        let messages = vec![
            Message::new("user", "what?"),
            Message { tool_calls: calls, ..Message::new("assistant", "So:") },
            Message::new("tool", "one"),
            Message::new("tool", "two"),
            Message::new("assistant", "three"),
        ];
        let tools = [json!({"type": "function", "function": {"name": "f"}})];
        let template = ChatTemplate::new(template).unwrap();
        let said = described(&template, messages, &tools);
        said.into_iter().map(|message| (message.role, message.content)).collect()
    }

    #[test]
    fn everything_is_said_in_words() {
        let said = conversation("{% for m in messages %}{{ m.content }}{% endfor %}");
        let roles: Vec<&str> = said.iter().map(|(role, _)| &role[..]).collect();
        assert_eq!(roles, ["system", "user", "assistant", "user", "assistant"]);
        let tool = "\n{\"type\": \"function\", \"function\": {\"name\": \"f\"}}\n";
        assert!(said[0].1.contains(tool), "{}", said[0].1);
        let call = |name: &str| {
            format!(
                "<tool_call>\n{{\"name\": \"{name}\", \"arguments\": {{\"x\": 1}}}}\n</tool_call>"
            )
        };
        assert_eq!(said[2].1, format!("So:\n{}\n{}", call("f"), call("g")));
        let result = |text: &str| format!("<tool_response>\n{text}\n</tool_response>");
        assert_eq!(said[3].1, format!("{}\n{}", result("one"), result("two")));
    }

    #[test]
    fn a_template_without_system_messages_has_the_tools_before_the_question() {
        for template in [
            "{{ messages[0].role == 'system' and raise_exception('no') }}{{ messages }}",
            "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
        ] {
            let said = conversation(template);
            assert_eq!((said.len(), &said[0].0[..]), (4, "user"));
            assert!(said[0].1.starts_with("You may") && said[0].1.ends_with("\n\nwhat?"));
        }
    }
}
