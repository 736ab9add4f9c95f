//! Points of a curve: smoothing, and thinning to what a screen can show.

/// A point of a curve.
pub(crate) type Point = (f64, f64);

/// Most columns of a curve; a chart is about as many pixels wide.
const COLUMNS: usize = 400;

/// Mean over about `span` points around each, so that it does not lag; at the end over those that
/// there are, in the beginning over as many before as after, because losses begin steeply.
pub(crate) fn smoothed(points: &[Point], span: usize) -> Vec<Point> {
    let sums: Vec<f64> = std::iter::once(0.0)
        .chain(points.iter().scan(0.0, |sum, point| {
            *sum += point.1;
            Some(*sum)
        }))
        .collect();
    let mean = |(i, &(x, _)): (usize, &Point)| {
        let half = (span / 2).min(i);
        let (from, to) = (i - half, (i + half + 1).min(points.len()));
        (x, (sums[to] - sums[from]) / (to - from) as f64)
    };
    points.iter().enumerate().map(mean).collect()
}

/// Columns of consecutive points.
fn columns(points: &[Point]) -> std::slice::Chunks<'_, Point> {
    points.chunks(points.len().div_ceil(COLUMNS).max(1))
}

/// One point of every column, its last; the first point of all stays as well.
pub(crate) fn thinned(points: &[Point]) -> Vec<Point> {
    let lasts = columns(points).filter_map(|column| column.last().copied());
    let first = points.first().copied().filter(|first| lasts.clone().next() != Some(*first));
    first.into_iter().chain(lasts).collect()
}

/// The lowest and the highest point of every column, in their order: what scatters stays visible.
pub(crate) fn extremes(points: &[Point]) -> Vec<Point> {
    let mut found = Vec::new();
    for column in columns(points) {
        let by_y = |a: &&Point, b: &&Point| a.1.total_cmp(&b.1);
        let (Some(low), Some(high)) = (column.iter().min_by(by_y), column.iter().max_by(by_y))
        else {
            continue;
        };
        match low.0.total_cmp(&high.0) {
            std::cmp::Ordering::Less => found.extend([*low, *high]),
            std::cmp::Ordering::Equal => found.push(*low),
            std::cmp::Ordering::Greater => found.extend([*high, *low]),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smoothing_does_not_lag_and_has_the_means_of_its_ends() {
        let line: Vec<Point> = (0..50).map(|i| (f64::from(i), f64::from(2 * i))).collect();
        let smooth = smoothed(&line, 11);
        assert!((0..45).all(|i| (smooth[i].1 - line[i].1).abs() < 1e-9), "{smooth:?}");
        // The last is over itself and the five before.
        assert_eq!(smooth[49], (49.0, 93.0));
        assert_eq!(smoothed(&line, 1), line);
        assert!(smoothed(&[], 9).is_empty());
    }

    #[test]
    fn thinning_keeps_ends_and_extremes() {
        let points: Vec<Point> =
            (0..10_000).map(|i| (f64::from(i), if i == 5003 { 99.0 } else { 1.0 })).collect();
        let thin = thinned(&points);
        assert!(thin.len() <= COLUMNS + 1);
        assert_eq!((thin[0].0, thin[thin.len() - 1].0), (0.0, 9999.0));
        assert!(extremes(&points).contains(&(5003.0, 99.0)));
        assert!(extremes(&points).windows(2).all(|pair| pair[0].0 < pair[1].0));
        assert!(thinned(&[]).is_empty() && extremes(&[]).is_empty());
        assert_eq!(thinned(&points[..3]), points[..3]);
    }
}
