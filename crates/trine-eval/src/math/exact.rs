//! Numbers and formulas that are compared exactly: quotients of sums of products of rational numbers, roots
//! of primes and variables.
//!
//! Products of powers `p^r` of different primes with exponents `0 <= r < 1` are linearly independent over
//! the rational numbers (Besicovitch, 1940), and pi is transcendental, so it counts as a variable. So a sum
//! of such products is zero only where all its coefficients are, and two quotients are the same where one's
//! numerator times the other's denominator is: nothing is rounded, and nothing is accepted that is not
//! equal, as formulas are, for all values of their variables. What would take too large numbers or too many
//! terms is given up: `None`.

use std::collections::BTreeMap;

/// Terms of a sum, at most.
const TERMS: usize = 400;

/// The largest exponent of what is multiplied out.
const EXPONENT: u32 = 40;

/// Primes are looked for up to this one; so what is below its square is factored.
const PRIME: u64 = 1_000_000;

/// The largest denominator of an exponent.
const ROOT: i128 = 24;

/// A rational number in lowest terms, of a positive denominator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rational {
    n: i128,
    d: i128,
}

impl Rational {
    const ONE: Self = Self { n: 1, d: 1 };

    pub(super) fn new(n: i128, d: i128) -> Option<Self> {
        let (mut a, mut b) = (n.checked_abs()?, d.checked_abs()?);
        while b != 0 {
            (a, b) = (b, a % b);
        }
        if d == 0 {
            return None;
        }
        let sign = d.signum();
        Some(Self { n: n / a * sign, d: d / a * sign })
    }

    fn add(self, other: Self) -> Option<Self> {
        let (a, b) = (self.n.checked_mul(other.d)?, other.n.checked_mul(self.d)?);
        Self::new(a.checked_add(b)?, self.d.checked_mul(other.d)?)
    }

    fn multiply(self, other: Self) -> Option<Self> {
        Self::new(self.n.checked_mul(other.n)?, self.d.checked_mul(other.d)?)
    }
}

/// What is multiplied in a term.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Atom {
    /// The root of a prime: its exponent is above 0 and below 1.
    Prime(u64),
    /// A variable, or pi: its exponent is a positive integer.
    Variable(&'static str, char),
}

/// Factors with their exponents.
type Product = BTreeMap<Atom, Rational>;

/// A sum of products, each with a coefficient that is not 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Sum(BTreeMap<Product, Rational>);

impl Sum {
    fn constant(value: Rational) -> Self {
        Self::default().plus(Product::new(), value).unwrap_or_default()
    }

    /// Adds a term.
    fn plus(mut self, product: Product, by: Rational) -> Option<Self> {
        let before = self.0.remove(&product).unwrap_or(Rational { n: 0, d: 1 });
        let now = before.add(by)?;
        if now.n != 0 {
            self.0.insert(product, now);
        }
        (self.0.len() <= TERMS).then_some(self)
    }

    fn add(&self, other: &Self) -> Option<Self> {
        let mut terms = other.0.iter();
        terms.try_fold(self.clone(), |sum, (product, by)| sum.plus(product.clone(), *by))
    }

    fn multiply(&self, other: &Self) -> Option<Self> {
        let mut sum = Self::default();
        for (a, x) in &self.0 {
            for (b, y) in &other.0 {
                let (product, by) = multiply(a, b)?;
                sum = sum.plus(product, x.multiply(*y)?.multiply(by)?)?;
            }
        }
        Some(sum)
    }

    /// The rational number that it is, if it is one.
    fn as_rational(&self) -> Option<Rational> {
        match self.0.len() {
            0 => Rational::new(0, 1),
            1 => self.0.get(&Product::new()).copied(),
            _ => None,
        }
    }
}

/// The product of two products, and a whole number that comes out of roots.
fn multiply(a: &Product, b: &Product) -> Option<(Product, Rational)> {
    let (mut product, mut by) = (a.clone(), Rational::ONE);
    for (atom, exponent) in b {
        let before = product.remove(atom).unwrap_or(Rational { n: 0, d: 1 });
        let mut exponent = before.add(*exponent)?;
        if let Atom::Prime(prime) = atom
            && exponent.n >= exponent.d
        {
            // Both were below 1.
            exponent = exponent.add(Rational { n: -1, d: 1 })?;
            by = by.multiply(Rational::new(i128::from(*prime), 1)?)?;
        }
        if exponent.n != 0 {
            product.insert(*atom, exponent);
        }
    }
    Some((product, by))
}

/// A formula.
#[derive(Clone, Debug)]
pub(super) struct Formula {
    over: Sum,
    /// Not zero.
    under: Sum,
}

impl Formula {
    pub(super) fn number(value: Rational) -> Self {
        Self { over: Sum::constant(value), under: Sum::constant(Rational::ONE) }
    }

    /// A variable of one letter, or a Greek one by the name that LaTeX has for it.
    pub(super) fn variable(command: &'static str, letter: char) -> Self {
        let product = Product::from([(Atom::Variable(command, letter), Rational::ONE)]);
        let over = Sum(BTreeMap::from([(product, Rational::ONE)]));
        Self { over, under: Sum::constant(Rational::ONE) }
    }

    pub(super) fn add(&self, other: &Self) -> Option<Self> {
        if self.under == other.under {
            return Some(Self { over: self.over.add(&other.over)?, under: self.under.clone() });
        }
        let (a, b) = (self.over.multiply(&other.under)?, other.over.multiply(&self.under)?);
        Some(Self { over: a.add(&b)?, under: self.under.multiply(&other.under)? })
    }

    pub(super) fn negative(&self) -> Option<Self> {
        self.multiply(&Self::number(Rational { n: -1, d: 1 }))
    }

    pub(super) fn multiply(&self, other: &Self) -> Option<Self> {
        let over = self.over.multiply(&other.over)?;
        Some(Self { over, under: self.under.multiply(&other.under)? })
    }

    /// `None` where `other` is zero.
    pub(super) fn divide(&self, other: &Self) -> Option<Self> {
        if other.over.0.is_empty() {
            return None;
        }
        self.multiply(&Self { over: other.under.clone(), under: other.over.clone() })
    }

    /// To the power of a rational number: an integer, or any where this is a positive rational number.
    pub(super) fn power(&self, exponent: &Self) -> Option<Self> {
        let exponent = exponent.as_rational()?;
        if exponent.d == 1 {
            let times = u32::try_from(exponent.n.unsigned_abs()).ok().filter(|n| *n <= EXPONENT)?;
            // 0 to the power of 0 is nothing.
            if self.over.0.is_empty() && exponent.n <= 0 {
                return None;
            }
            let one = Self::number(Rational::ONE);
            let power = (0..times).try_fold(one.clone(), |power, _| power.multiply(self))?;
            return if exponent.n < 0 { one.divide(&power) } else { Some(power) };
        }
        let base = self.as_rational().filter(|base| base.n > 0 && exponent.d <= ROOT)?;
        let over = root(base.n, exponent)?;
        over.multiply(&root(base.d, Rational { n: exponent.n.checked_neg()?, ..exponent })?)
    }

    fn as_rational(&self) -> Option<Rational> {
        let (over, under) = (self.over.as_rational()?, self.under.as_rational()?);
        over.multiply(Rational::new(under.d, under.n)?)
    }

    /// Whether both are the same; `None` where that takes too much.
    pub(super) fn equals(&self, other: &Self) -> Option<bool> {
        Some(self.over.multiply(&other.under)? == other.over.multiply(&self.under)?)
    }
}

/// A positive integer to the power of a rational number.
fn root(base: i128, exponent: Rational) -> Option<Formula> {
    let mut result = Formula::number(Rational::ONE);
    for (prime, count) in factors(base)? {
        let all = Rational::new(i128::from(count).checked_mul(exponent.n)?, exponent.d)?;
        let whole = all.n.div_euclid(all.d);
        let prime_number = Formula::number(Rational::new(i128::from(prime), 1)?);
        result =
            result.multiply(&prime_number.power(&Formula::number(Rational::new(whole, 1)?))?)?;
        let rest = all.add(Rational::new(-whole, 1)?)?;
        if rest.n != 0 {
            let product = Product::from([(Atom::Prime(prime), rest)]);
            let over = Sum(BTreeMap::from([(product, Rational::ONE)]));
            result = result.multiply(&Formula { over, under: Sum::constant(Rational::ONE) })?;
        }
    }
    Some(result)
}

/// Primes with their exponents.
fn factors(number: i128) -> Option<Vec<(u64, u32)>> {
    let mut left = u64::try_from(number).ok().filter(|n| *n < PRIME * PRIME)?;
    let mut factors = Vec::new();
    let mut prime = 2;
    while prime * prime <= left {
        let mut count = 0;
        while left.is_multiple_of(prime) {
            left /= prime;
            count += 1;
        }
        if count > 0 {
            factors.push((prime, count));
        }
        prime += 1;
    }
    if left > 1 {
        factors.push((left, 1));
    }
    Some(factors)
}
