//! Groups of alike experts: agglomerative with average linkage (HC-SMoE; specs: methods 6.3) and k-means (Sub-MoE, 3.2) on the rows of the
//! distance matrix, as REAP's reading of it has it. No group is ever empty.

use calib::checkpoint::Fingerprint;
use ndarray::Array2;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How experts fall into groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Clustering {
    /// The two groups whose members are closest on average become one, again and again.
    #[default]
    AverageLinkage,
    /// k-means with k-means++ seeds, the best of several starts.
    KMeans,
}

/// Starts of k-means.
const STARTS: u64 = 20;
/// Rounds of one start.
const ROUNDS: usize = 100;

/// Labels `0..count` of average linkage over `distances`, `[experts, experts]`, symmetric. Of equally close groups the pair of smaller
/// hashes goes first.
///
/// # Panics
///
/// If there are fewer experts than groups, or no group.
pub fn average_linkage(distances: &Array2<f64>, count: usize, hashes: &[String]) -> Vec<usize> {
    let mut groups: Vec<Vec<usize>> = (0..distances.nrows()).map(|e| vec![e]).collect();
    assert!((1..=groups.len()).contains(&count), "between one group and one an expert");
    let least = |group: &[usize]| group.iter().map(|&e| &hashes[e]).min().cloned();
    while groups.len() > count {
        let mean = |a: &[usize], b: &[usize]| {
            let mut all: Vec<f64> = a.iter().flat_map(|&i| b.iter().map(move |&j| distances[(i, j)])).collect();
            // In an order that does not depend on the numbering.
            all.sort_unstable_by(f64::total_cmp);
            all.iter().sum::<f64>() / all.len() as f64
        };
        let pairs = (0..groups.len()).flat_map(|a| (a + 1..groups.len()).map(move |b| (a, b)));
        let key = |&(a, b): &(usize, usize)| {
            let (one, two) = (least(&groups[a]), least(&groups[b]));
            (mean(&groups[a], &groups[b]), if one <= two { (one, two) } else { (two, one) })
        };
        let keyed = pairs.map(|pair| (key(&pair), pair)).min_by(|(x, _), (y, _)| x.0.total_cmp(&y.0).then_with(|| x.1.cmp(&y.1)));
        let Some((_, (a, b))) = keyed else { break };
        let joined = groups.remove(b);
        groups[a].extend(joined);
    }
    labels(&groups, distances.nrows())
}

/// Labels `0..count` of k-means over the rows of `distances`, `[experts, experts]`.
///
/// Everything runs in the order of the hashes, from which k-means++ draws too, so that the numbering does not matter.
///
/// # Panics
///
/// As [`average_linkage`].
pub fn k_means(distances: &Array2<f64>, count: usize, hashes: &[String]) -> Vec<usize> {
    let experts = distances.nrows();
    assert!((1..=experts).contains(&count), "between one group and one an expert");
    // Experts in the order of their hashes: everything below runs in it.
    let mut order: Vec<usize> = (0..experts).collect();
    order.sort_by(|&a, &b| hashes[a].cmp(&hashes[b]));
    let points: Vec<Vec<f64>> = order.iter().map(|&i| order.iter().map(|&j| distances[(i, j)]).collect()).collect();
    let starts = (0..STARTS).map(|start| lloyd(&points, seeds(&points, count, start, &order, hashes)));
    let best = starts.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(labels, _)| labels).unwrap_or_default();
    let mut found = vec![0; experts];
    order.iter().zip(best).for_each(|(&expert, label)| found[expert] = label);
    found
}

fn square(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum()
}

/// k-means++: each further seed is drawn with the probability of its squared distance to the nearest one.
fn seeds(points: &[Vec<f64>], count: usize, start: u64, order: &[usize], hashes: &[String]) -> Vec<usize> {
    let draw = |step: usize| {
        let print = order.iter().fold(Fingerprint::of("k-means").number(start).number(step as u64), |p, &e| p.field(hashes[e].as_bytes()));
        u64::from_str_radix(&print.finish()[..13], 16).unwrap_or(0) as f64 / 2_f64.powi(52)
    };
    let mut seeds = vec![((draw(0) * points.len() as f64) as usize).min(points.len() - 1)];
    while seeds.len() < count {
        let far: Vec<f64> = points.iter().map(|p| seeds.iter().map(|&s| square(p, &points[s])).fold(f64::INFINITY, f64::min)).collect();
        let mut left = draw(seeds.len()) * far.iter().sum::<f64>();
        let mut pick = None;
        for (at, weight) in far.iter().enumerate().filter(|(at, _)| !seeds.contains(at)) {
            pick = Some(at);
            left -= weight;
            if left < 0.0 {
                break;
            }
        }
        seeds.extend(pick);
    }
    seeds
}

/// Lloyd's rounds from these seeds: labels and the sum of squares. A group that loses its last point takes the point farthest from its
/// center.
fn lloyd(points: &[Vec<f64>], seeds: Vec<usize>) -> (Vec<usize>, f64) {
    let mut centers: Vec<Vec<f64>> = seeds.into_iter().map(|s| points[s].clone()).collect();
    let mut labels = vec![usize::MAX; points.len()];
    for _ in 0..ROUNDS {
        let nearest =
            |p: &Vec<f64>| (0..centers.len()).min_by(|&a, &b| square(p, &centers[a]).total_cmp(&square(p, &centers[b]))).unwrap_or(0);
        let mut next: Vec<usize> = points.iter().map(nearest).collect();
        for group in 0..centers.len() {
            if !next.contains(&group) {
                let apart = |at: &usize| square(&points[*at], &centers[next[*at]]);
                let crowded = (0..points.len()).filter(|&at| next.iter().filter(|l| **l == next[at]).count() > 1);
                if let Some(far) = crowded.max_by(|a, b| apart(a).total_cmp(&apart(b))) {
                    next[far] = group;
                }
            }
        }
        let same = next == labels;
        labels = next;
        for (group, center) in centers.iter_mut().enumerate() {
            let members: Vec<&Vec<f64>> = points.iter().zip(&labels).filter(|(_, l)| **l == group).map(|(p, _)| p).collect();
            for (d, c) in center.iter_mut().enumerate() {
                *c = members.iter().map(|p| p[d]).sum::<f64>() / members.len().max(1) as f64;
            }
        }
        if same {
            break;
        }
    }
    let loss = points.iter().zip(&labels).map(|(p, &l)| square(p, &centers[l])).sum();
    (labels, loss)
}

fn labels(groups: &[Vec<usize>], experts: usize) -> Vec<usize> {
    let mut labels = vec![0; experts];
    for (label, group) in groups.iter().enumerate() {
        group.iter().for_each(|&e| labels[e] = label);
    }
    labels
}

#[cfg(test)]
mod tests {
    use ndarray::array;

    use super::*;

    fn hashes(count: usize) -> Vec<String> {
        (0..count).map(|e| format!("{:02}", (e * 5) % 7)).collect()
    }

    /// Points on a line.
    fn line(at: &[f64]) -> Array2<f64> {
        Array2::from_shape_fn((at.len(), at.len()), |(i, j)| (at[i] - at[j]).abs())
    }

    #[test]
    fn linkage_by_hand() {
        // 0 and 1 are 1 apart, 4 and 6 are 2; {0, 1} to {4, 6} 4.5 on average, to 10 it is 9.5, {4, 6} to 10 is 5.
        let d = line(&[0.0, 1.0, 4.0, 6.0, 10.0]);
        assert_eq!(average_linkage(&d, 3, &hashes(5)), [0, 0, 1, 1, 2]);
        assert_eq!(average_linkage(&d, 2, &hashes(5)), [0, 0, 0, 0, 1]);
        assert_eq!(average_linkage(&d, 5, &hashes(5)), [0, 1, 2, 3, 4]);
        assert_eq!(average_linkage(&d, 1, &hashes(5)), [0; 5]);
    }

    #[test]
    fn means_find_what_lies_apart() {
        let labels = k_means(&line(&[0.0, 0.1, 5.0, 5.1, 9.0]), 3, &hashes(5));
        assert!(labels[0] == labels[1] && labels[2] == labels[3] && labels[4] != labels[0] && labels[4] != labels[2], "{labels:?}");
    }

    #[test]
    fn experts_at_one_point_still_fill_every_group() {
        let labels = k_means(&array![[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], 3, &hashes(3));
        let mut sorted = labels;
        sorted.sort_unstable();
        assert_eq!(sorted, [0, 1, 2]);
    }
}
