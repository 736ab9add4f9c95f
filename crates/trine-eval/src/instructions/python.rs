//! What Python's methods of strings do where Rust's differ a little.

/// White space of `str.isspace`: Unicode's, and four separators of ASCII.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// `str.strip`.
pub(super) fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// `str.rstrip`.
pub(super) fn rstrip(text: &str) -> &str {
    text.trim_end_matches(is_space)
}

/// `str.isupper`: it has letters with a case, and all of them are capitals.
pub(super) fn is_upper(text: &str) -> bool {
    text.chars().any(char::is_uppercase) && !text.chars().any(|c| c.is_lowercase() || is_title(c))
}

/// `str.islower`.
pub(super) fn is_lower(text: &str) -> bool {
    text.chars().any(char::is_lowercase) && !text.chars().any(|c| c.is_uppercase() || is_title(c))
}

/// A letter like `ǅ`, which is neither: half of it is a capital.
fn is_title(c: char) -> bool {
    !c.is_uppercase() && !c.is_lowercase() && c.to_lowercase().ne([c])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_pythons() {
        assert!(is_upper("ÀB 1!") && !is_upper("12") && !is_upper("Ab") && !is_upper("Aǅ"));
        assert!(is_lower("àb 1!") && !is_lower("…") && !is_lower("aǅ"));
        assert_eq!(strip("\u{a0}\x1c a \u{2003}"), "a");
        assert_eq!(rstrip(" a\n"), " a");
    }
}
