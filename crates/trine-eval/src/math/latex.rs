//! Answers in LaTeX as values: formulas, and tuples, intervals, sets and matrices of them.
//!
//! Read is only what can mean one thing. No value has, among others: a number before a fraction (`1\frac12`
//! is 3/2 or 1/2), what is multiplied after a slash (`1/2x`), a number behind something (`x2`), `f(x)` and
//! its like, three letters in a row, which are a word, powers of powers, indices, `\pm`, functions.

use super::exact::{Formula, Rational};

/// Brackets within brackets, at most.
const DEPTH: usize = 24;

/// Letters that are functions where a bracket follows.
const FUNCTIONS: &str = "fghFGHPQ";

/// Greek letters, as LaTeX calls them.
const GREEK: [&str; 20] = [
    "pi", "alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "nu", "xi", "rho",
    "sigma", "tau", "phi", "varphi", "chi", "psi", "omega", "eta",
];

/// What an answer says.
#[derive(Debug)]
pub(super) enum Value {
    Formula(Formula),
    /// Plus or minus infinity.
    Infinity(bool),
    /// Values in their order, between brackets or, of a list without, between nothing.
    Several(&'static str, Vec<Value>),
}

impl Value {
    /// The value of a normalised answer; `None` where it has none.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let tokens = tokens(text)?;
        value(&tokens, 0)
    }

    /// Whether both are surely the same.
    pub(super) fn equals(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Formula(a), Self::Formula(b)) => a.equals(b) == Some(true),
            (Self::Infinity(a), Self::Infinity(b)) => a == b,
            (Self::Several(a, x), Self::Several(b, y)) => {
                a == b && x.len() == y.len() && x.iter().zip(y).all(|(x, y)| x.equals(y))
            }
            _ => false,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
enum Token {
    /// Digits, with a point or not.
    Number(String),
    Letter(char),
    /// What follows a backslash.
    Command(String),
    Sign(char),
}

fn tokens(text: &str) -> Option<Vec<Token>> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let run =
            |fits: fn(char) -> bool, text: &str| text.find(|c| !fits(c)).unwrap_or(text.len());
        let (token, length) = match first {
            '0'..='9' | '.' => {
                let length = run(|c| c.is_ascii_digit() || c == '.', rest);
                (Token::Number(rest[..length].to_owned()), length)
            }
            'a'..='z' | 'A'..='Z' => (Token::Letter(first), 1),
            '\\' => {
                let length = run(|c| c.is_ascii_alphabetic(), &rest[1..]);
                let length =
                    if length == 0 { rest[1..].chars().next()?.len_utf8() } else { length };
                (Token::Command(rest[1..1 + length].to_owned()), 1 + length)
            }
            _ => (Token::Sign(first), first.len_utf8()),
        };
        rest = &rest[length..];
        let empty = matches!(&token, Token::Sign(' '))
            || matches!(&token, Token::Command(name)
                if ["left", "right", ",", "!", ";", ":", " "].contains(&&name[..]));
        if !empty {
            tokens.push(token);
        }
    }
    let word = |run: &[Token]| run.iter().all(|token| matches!(token, Token::Letter(_)));
    // Those of an environment's name are told by what stands before.
    (!plain(&tokens).windows(3).any(word)).then_some(tokens)
}

/// The tokens between which letters stand that are no name of an environment.
fn plain(tokens: &[Token]) -> &[Token] {
    match tokens {
        [Token::Command(begin), ..] if begin == "begin" => &[],
        tokens => tokens,
    }
}

fn command(token: &Token, name: &str) -> bool {
    matches!(token, Token::Command(found) if found == name)
}

/// 1 for what opens a bracket, -1 for what closes one.
fn bracket(token: &Token) -> i32 {
    match token {
        Token::Sign('(' | '[' | '{') => 1,
        Token::Sign(')' | ']' | '}') => -1,
        Token::Command(name) if name == "{" => 1,
        Token::Command(name) if name == "}" => -1,
        _ => 0,
    }
}

/// Parts between what `divides`, outside of all brackets; `None` where brackets do not fit.
fn split(tokens: &[Token], divides: impl Fn(&Token) -> bool) -> Option<Vec<&[Token]>> {
    let (mut parts, mut from, mut depth) = (Vec::new(), 0, 0);
    for (at, token) in tokens.iter().enumerate() {
        depth += bracket(token);
        if depth < 0 {
            return None;
        }
        if depth == 0 && divides(token) {
            parts.push(&tokens[from..at]);
            from = at + 1;
        }
    }
    parts.push(&tokens[from..]);
    (depth == 0).then_some(parts)
}

fn value(tokens: &[Token], depth: usize) -> Option<Value> {
    if depth > DEPTH {
        return None;
    }
    if let Some(rows) = matrix(tokens) {
        let mut values = Vec::new();
        for row in split(rows, |token| command(token, "\\"))? {
            values.push(several("&", &split(row, |token| *token == Token::Sign('&'))?, depth)?);
        }
        return Some(Value::Several("matrix", values));
    }
    let parts = split(tokens, |token| command(token, "cup"))?;
    if parts.len() > 1 {
        return several("cup", &parts, depth);
    }
    let parts = split(tokens, |token| *token == Token::Sign(','))?;
    if parts.len() > 1 {
        return several(",", &parts, depth);
    }
    match tokens {
        [Token::Command(name)] if name == "infty" => return Some(Value::Infinity(true)),
        [Token::Sign(sign @ ('+' | '-')), Token::Command(name)] if name == "infty" => {
            return Some(Value::Infinity(*sign == '+'));
        }
        [open, inner @ .., close] if bracket(open) == 1 && bracket(close) == -1 => {
            let inner_parts = split(inner, |token| *token == Token::Sign(','));
            let kind = kind(open, close);
            if let (Some(parts), Some(kind)) = (inner_parts, kind)
                && (parts.len() > 1 || kind == "{}")
            {
                return several(kind, &parts, depth);
            }
        }
        _ => (),
    }
    Reader { tokens, depth }.whole().map(Value::Formula)
}

fn several(kind: &'static str, parts: &[&[Token]], depth: usize) -> Option<Value> {
    let values = parts.iter().map(|part| value(part, depth + 1));
    Some(Value::Several(kind, values.collect::<Option<_>>()?))
}

/// The brackets around several values.
fn kind(open: &Token, close: &Token) -> Option<&'static str> {
    match (open, close) {
        (Token::Sign('('), Token::Sign(')')) => Some("()"),
        (Token::Sign('('), Token::Sign(']')) => Some("(]"),
        (Token::Sign('['), Token::Sign(')')) => Some("[)"),
        (Token::Sign('['), Token::Sign(']')) => Some("[]"),
        (open, close) if command(open, "{") && command(close, "}") => Some("{}"),
        _ => None,
    }
}

/// What stands in a matrix.
fn matrix(tokens: &[Token]) -> Option<&[Token]> {
    let name = |tokens: &[Token]| -> String {
        let letter = |token: &Token| if let Token::Letter(c) = token { Some(*c) } else { None };
        tokens.iter().filter_map(letter).collect()
    };
    let open = tokens.iter().position(|token| *token == Token::Sign('}'))?;
    let close = tokens.len().checked_sub(open + 1)?;
    let (begin, end) = (tokens.get(..=open)?, tokens.get(close..)?);
    let fits = command(begin.first()?, "begin") && command(end.first()?, "end") && close > open;
    (fits && name(begin) == "pmatrix" && name(end) == "pmatrix").then(|| &tokens[open + 1..close])
}

/// The commands of a fraction.
const FRACTIONS: [&str; 4] = ["frac", "dfrac", "tfrac", "cfrac"];

/// Whether what stands behind a number is a fraction of numbers, with which it may be a mixed number.
fn mixed(tokens: &[Token]) -> bool {
    let Some((Token::Command(name), rest)) = tokens.split_first() else { return false };
    let brace = |token: &&Token| !matches!(token, Token::Sign('{' | '}'));
    let mut operands = rest.iter().filter(brace).take(2);
    FRACTIONS.contains(&&name[..]) && operands.all(|token| matches!(token, Token::Number(_)))
}

/// Reads a formula from the front.
struct Reader<'a> {
    tokens: &'a [Token],
    depth: usize,
}

impl<'a> Reader<'a> {
    fn next(&mut self) -> Option<&'a Token> {
        let (first, rest) = self.tokens.split_first()?;
        self.tokens = rest;
        Some(first)
    }

    fn take(&mut self, signs: &str) -> Option<char> {
        match self.tokens.first()? {
            Token::Sign(sign) if signs.contains(*sign) => {
                self.next();
                Some(*sign)
            }
            _ => None,
        }
    }

    /// A sum that is all there is.
    fn whole(mut self) -> Option<Formula> {
        if self.depth > DEPTH {
            return None;
        }
        let mut sum = self.term()?;
        while let Some(sign) = self.take("+-") {
            let term = self.product()?;
            sum = sum.add(&if sign == '-' { term.negative()? } else { term })?;
        }
        self.tokens.is_empty().then_some(sum)
    }

    /// A product that may have a sign.
    fn term(&mut self) -> Option<Formula> {
        match self.take("+-") {
            Some('-') => self.product()?.negative(),
            _ => self.product(),
        }
    }

    fn product(&mut self) -> Option<Formula> {
        let (mut product, mut divided) = (self.factor()?, false);
        while let Some(token) = self.tokens.first() {
            match token {
                Token::Sign('+' | '-') => break,
                Token::Sign('*') => {
                    self.next();
                    product = product.multiply(&self.factor()?)?;
                    divided = false;
                }
                Token::Command(name) if name == "cdot" || name == "times" => {
                    self.next();
                    product = product.multiply(&self.factor()?)?;
                    divided = false;
                }
                Token::Sign('/') => {
                    self.next();
                    product = product.divide(&self.factor()?)?;
                    divided = true;
                }
                Token::Number(_) => return None,
                _ if divided => return None,
                _ => product = product.multiply(&self.factor()?)?,
            }
        }
        Some(product)
    }

    fn factor(&mut self) -> Option<Formula> {
        let base = match self.next()? {
            Token::Number(digits) => {
                if mixed(self.tokens) {
                    return None;
                }
                Formula::number(decimal(digits)?)
            }
            Token::Letter(letter) => {
                if FUNCTIONS.contains(*letter) && self.tokens.first() == Some(&Token::Sign('(')) {
                    return None;
                }
                Formula::variable("", *letter)
            }
            Token::Sign('(') => self.inside(')')?,
            Token::Sign('{') => self.inside('}')?,
            Token::Command(name) => self.command(name)?,
            Token::Sign(_) => return None,
        };
        if self.take("^").is_none() {
            return Some(base);
        }
        let exponent = self.argument()?;
        // Another power, or a digit that looks as if it were part of this one.
        match self.tokens.first() {
            Some(Token::Sign('^') | Token::Number(_)) => None,
            _ => base.power(&exponent),
        }
    }

    fn command(&mut self, name: &str) -> Option<Formula> {
        match name {
            _ if FRACTIONS.contains(&name) => {
                let over = self.argument()?;
                over.divide(&self.argument()?)
            }
            "sqrt" => {
                let index = match self.take("[") {
                    Some(_) => self.inside(']')?,
                    None => Formula::number(Rational::new(2, 1)?),
                };
                let one = Formula::number(Rational::new(1, 1)?);
                let (under, exponent) = (self.argument()?, one.divide(&index)?);
                // The root of zero is zero.
                match under.equals(&Formula::number(Rational::new(0, 1)?))? {
                    true => Some(under),
                    false => under.power(&exponent),
                }
            }
            _ => {
                let greek = GREEK.iter().copied().find(|greek| *greek == name)?;
                Some(Formula::variable(greek, ' '))
            }
        }
    }

    /// What a command or a power takes: what is in braces, or a single sign.
    fn argument(&mut self) -> Option<Formula> {
        match self.tokens.first()? {
            Token::Sign('{') => {
                self.next();
                self.inside('}')
            }
            Token::Number(digits) if digits.len() == 1 => {
                self.next();
                Some(Formula::number(decimal(digits)?))
            }
            Token::Letter(letter) => {
                self.next();
                Some(Formula::variable("", *letter))
            }
            Token::Command(name) if GREEK.contains(&&name[..]) => {
                self.next();
                self.command(name)
            }
            _ => None,
        }
    }

    /// The sum up to the bracket that closes.
    fn inside(&mut self, close: char) -> Option<Formula> {
        let mut depth = 1;
        let end = self.tokens.iter().position(|token| {
            depth += bracket(token);
            depth == 0
        })?;
        if self.tokens[end] != Token::Sign(close) {
            return None;
        }
        let inner = Reader { tokens: &self.tokens[..end], depth: self.depth + 1 };
        self.tokens = &self.tokens[end + 1..];
        inner.whole()
    }
}

fn decimal(digits: &str) -> Option<Rational> {
    let (whole, part) = digits.split_once('.').unwrap_or((digits, ""));
    if part.contains('.') || digits.ends_with('.') {
        return None;
    }
    let number = format!("{whole}{part}").parse().ok()?;
    Rational::new(number, 10i128.checked_pow(u32::try_from(part.len()).ok()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether two texts have values, and those are the same.
    fn same(a: &str, b: &str) -> Option<bool> {
        Some(Value::parse(a)?.equals(&Value::parse(b)?))
    }

    #[test]
    fn what_is_equal_is_found_equal() {
        for (a, b) in [
            ("\\frac{1}{2}", "0.5"),
            (".5", "1/2"),
            ("x(x+1)", "x^2+x"),
            ("(a+5)(b+2)", "ab+2a+5b+10"),
            ("\\sqrt{12}", "2\\sqrt{3}"),
            ("\\frac{1}{\\sqrt{3}}", "\\frac{\\sqrt{3}}{3}"),
            ("\\frac{1}{1+\\sqrt{2}}", "\\sqrt{2}-1"),
            ("\\sqrt[3]{16}", "2\\cdot2^{1/3}"),
            ("\\sqrt{\\frac{1}{2}}", "\\frac{\\sqrt{2}}{2}"),
            ("4^{-\\frac{1}{2}}", "0.5"),
            ("\\sqrt{2}\\sqrt{3}", "\\sqrt{6}"),
            ("\\frac{\\pi}{2}", "0.5\\pi"),
            ("\\frac{x^2-1}{x-1}", "x+1"),
            ("\\left(3,\\frac{\\pi}{2}\\right)", "(3,\\pi/2)"),
            ("(-\\infty,2)\\cup(3,\\infty)", "(-\\infty,2.0)\\cup(3,+\\infty)"),
            (
                "\\begin{pmatrix}-1/3\\\\2/3\\end{pmatrix}",
                "\\begin{pmatrix}-\\frac{1}{3}\\\\\\frac{2}{3}\\end{pmatrix}",
            ),
            ("\\{1,-2\\}", "\\{1.0,-2\\}"),
            ("6-5i", "-5i+6"),
            ("\\frac{270}7", "\\frac{540}{14}"),
            ("-(-3)", "3"),
            ("6\\frac{\\sqrt{8}}{2}", "6\\sqrt{2}"),
            ("\\sqrt{0}", "0"),
        ] {
            assert_eq!(same(a, b), Some(true), "{a} and {b}");
        }
    }

    #[test]
    fn what_differs_is_found_different() {
        for (a, b) in [
            ("0.33", "\\frac{1}{3}"),
            ("3.14159265358979", "\\pi"),
            ("1.41421356237", "\\sqrt{2}"),
            ("\\sqrt{2}+\\sqrt{3}", "\\sqrt{5}"),
            ("\\sqrt{2}+\\sqrt{3}", "3.14626436994"),
            ("(3,4]", "(3,4)"),
            ("(1,2)", "(2,1)"),
            ("1,2", "(1,2)"),
            ("x", "y"),
            ("X", "x"),
            ("x^2", "2x"),
            ("-2^2", "4"),
            ("\\infty", "-\\infty"),
            ("1", "1,1"),
            ("\\begin{pmatrix}1&2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
            ("2^{40}", "2^{39}"),
        ] {
            assert_eq!(same(a, b), Some(false), "{a} and {b}");
        }
    }

    #[test]
    fn what_could_mean_another_thing_has_no_value() {
        for text in [
            "1\\frac{4}{5}",
            "1\\frac45",
            "1/2x",
            "x2",
            "f(x)",
            "P(2)",
            "even",
            "Evelyn",
            "x^2^3",
            "x^12",
            "52_8",
            "1\\pm\\sqrt{19}",
            "\\cotx",
            "\\sqrt{-4}",
            "\\sqrt{x^2}",
            "1/0",
            "\\frac{1}{x-x}",
            "0^0",
            "\\sqrt{2+\\sqrt{3}}",
            "2^x",
            "",
            "+",
            "(",
            ")(",
            "1,",
            "()",
            "{}",
            "[3]",
            "3.",
            "1.2.3",
            "\\",
            "\\frac{1}",
            "50\\%",
            "5!",
            "|x|",
            "2--3",
            "2*-3",
            "\\infty-\\infty",
            "ä",
            "2\u{b2}",
            "\\begin{pmatrix}1\\end{bmatrix}",
            "\\begin{pmatrix}",
            "10^{100}",
            "(1+x)^{99}",
            "99999999999999999999999999999999999999999999",
            "\\sqrt{10000000000000}",
        ] {
            assert!(Value::parse(text).is_none(), "{text}");
        }
        let deep = "(".repeat(500) + "1" + &")".repeat(500);
        assert!(Value::parse(&deep).is_none());
    }

    #[test]
    fn equal_values_are_equal_as_numbers() {
        // Everything that is accepted is near: a second opinion, in floating point.
        let parts =
            ["2", "\\sqrt{2}", "\\sqrt{8}", "\\sqrt[3]{2}", "\\frac{3}{4}", "\\sqrt{3}", "0.75"];
        let numbers: [f64; 7] =
            [2.0, 2f64.sqrt(), 8f64.sqrt(), 2f64.cbrt(), 0.75, 3f64.sqrt(), 0.75];
        let mut texts = Vec::new();
        for (a, x) in parts.iter().zip(numbers) {
            for (b, y) in parts.iter().zip(numbers) {
                texts.push((format!("{a}+{b}"), x + y));
                texts.push((format!("{a}\\cdot{b}"), x * y));
                texts.push((format!("\\frac{{{a}}}{{{b}+1}}"), x / (y + 1.0)));
                texts.push((format!("({a}-{b})^3"), (x - y).powi(3)));
            }
        }
        for (a, x) in &texts {
            for (b, y) in &texts {
                assert_eq!(same(a, b), Some((x - y).abs() < 1e-9), "{a} and {b}");
            }
        }
    }
}
