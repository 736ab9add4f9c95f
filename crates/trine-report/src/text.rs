//! Numbers and texts as a page shows them.

/// A text inside HTML, in an element or in a quoted attribute.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // Not allowed in HTML; a tokenizer may well produce them.
            c if c.is_control() && c != '\n' && c != '\t' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// JSON inside a script element: no text in it can end the element.
pub(crate) fn script_json(value: &serde_json::Value) -> String {
    value.to_string().replace('<', "\\u003c").replace('\u{2028}', "\\u2028")
}

/// A count in full: 1,234,567.
pub(crate) fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A count in three digits: 1.23 M.
pub(crate) fn short(n: f64) -> String {
    let (value, unit) = match n.abs() {
        n if n >= 999.5e6 => (n / 1e9, " B"),
        n if n >= 999.5e3 => (n / 1e6, " M"),
        n if n >= 9_999.5 => (n / 1e3, " k"),
        _ => return count(n.round() as u64),
    };
    let decimals = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    format!("{value:.decimals$}{unit}")
}

/// A number in `digits` significant digits.
pub(crate) fn significant(value: f64, digits: usize) -> String {
    if value == 0.0 || !value.is_finite() {
        return "0".to_owned();
    }
    let rounded = format!("{value:.*e}", digits.saturating_sub(1));
    let (mantissa, exponent) = rounded.split_once('e').unwrap_or((&rounded, "0"));
    match exponent.parse::<i32>() {
        Ok(e @ -4..=5) => format!("{value:.*}", (digits as i32 - 1 - e).max(0) as usize),
        _ => {
            let trimmed = mantissa.trim_end_matches('0').trim_end_matches('.');
            let mantissa = if mantissa.contains('.') { trimmed } else { mantissa };
            format!("{mantissa}e{exponent}").replace("e-", "e\u{2212}")
        }
    }
}

/// A share as percent, in three digits; a very small one in two.
pub(crate) fn percent(share: f64) -> String {
    let digits = if share.abs() < 1e-4 { 2 } else { 3 };
    format!("{}\u{202f}%", significant(100.0 * share, digits))
}

/// Five digits are more than a pixel shows.
pub(crate) fn rounded(value: f64) -> f64 {
    format!("{value:.4e}").parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_escapes_from_texts() {
        let hostile = "</script><b a='\"&\u{0}";
        assert_eq!(escape(hostile), "&lt;/script&gt;&lt;b a=&#39;&quot;&amp;\u{fffd}");
        assert!(!script_json(&serde_json::json!({ "n": hostile })).contains('<'));
    }

    #[test]
    fn numbers_are_short() {
        for (n, text) in [(7.0, "7"), (9_999.0, "9,999"), (12_345.0, "12.3 k"), (1.5e6, "1.50 M")] {
            assert_eq!(short(n), text);
        }
        assert_eq!(short(999_600.0), "1.00 M");
        for (value, text) in [(1.23456, "1.235"), (0.0012345, "0.001234"), (0.0, "0")] {
            assert_eq!(significant(value, 4), text);
        }
        assert_eq!(significant(3e-5, 2), "3e\u{2212}5");
        assert_eq!(significant(1.2e7, 3), "1.2e7");
        assert_eq!(percent(0.3456), "34.6\u{202f}%");
    }
}
