//! Line plots as SVG: white background, a name beside the end of each line, and colours, dashes and
//! markers that can be told apart in print, too.

use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::failure::{Failure, Outcome};

/// A line of a plot.
pub(crate) struct Line {
    pub(crate) name: String,
    /// x, y and half the height of an error bar (0 for none).
    pub(crate) points: Vec<(f64, f64, f64)>,
    /// Which of the looks it has.
    pub(crate) look: usize,
}

/// What is written at the axes.
pub(crate) struct Axes<'a> {
    pub(crate) x: &'a str,
    pub(crate) y: &'a str,
    /// Both axes logarithmic, to base 2.
    pub(crate) logarithmic: bool,
}

const SIZE: (u32, u32) = (960, 560);
/// Room for the names.
const NAMES: u32 = 190;
const FONT: &str = "sans-serif";
/// Okabe and Ito's colours, which colour-blind readers can tell apart, with the dark ones first.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 0, 0),
    RGBColor(213, 94, 0),
    RGBColor(0, 114, 178),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
];
/// Dash and gap in pixels; no gap is a whole line.
const DASHES: [(i32, i32); 6] = [(1, 0), (10, 4), (4, 3), (18, 5), (2, 4), (26, 8)];
/// Markers of a line, about.
const MARKERS: usize = 10;

/// Draws lines.
pub(crate) fn draw(lines: &[Line], axes: &Axes<'_>) -> Outcome<String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
        draw_on(&root, lines, axes)
            .map_err(|e| Failure::runtime(format!("cannot draw {}: {e}", axes.y)))?;
    }
    svg.push('\n');
    Ok(svg)
}

type Root<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'b, SVGBackend<'a>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

fn draw_on(root: &Root<'_>, lines: &[Line], axes: &Axes<'_>) -> Drawn {
    root.fill(&WHITE)?;
    let scale = |v: f64| if axes.logarithmic { v.log2() } else { v };
    let points = || lines.iter().flat_map(|line| &line.points);
    let x = range(points().map(|p| scale(p.0)), 0.0);
    let y = range(points().flat_map(|p| [p.1 - p.2, p.1 + p.2]).map(scale), 0.05);
    let mut chart = ChartBuilder::on(root)
        .margin(14)
        .margin_right(NAMES)
        .x_label_area_size(48)
        .y_label_area_size(78)
        .build_cartesian_2d(x.0..x.1, y.0..y.1)?;
    let text = |size: i32| (FONT, size).into_font().color(&BLACK);
    let plain = move |v: &f64, step: f64| match axes.logarithmic {
        true => short(v.exp2()),
        // Ticks are sums of steps: that of zero may be a little below it, which would read "-0.00".
        false if v.abs() < 1e-6 * step => "0".into(),
        false => format!("{v:.*}", decimals(step)),
    };
    let (x_step, y_step) = ((x.1 - x.0) / 8.0, (y.1 - y.0) / 8.0);
    chart
        .configure_mesh()
        .x_labels(8)
        .y_labels(8)
        .x_label_formatter(&|v| plain(v, x_step))
        .y_label_formatter(&|v| plain(v, y_step))
        .x_desc(axes.x)
        .y_desc(axes.y)
        .light_line_style(TRANSPARENT)
        .bold_line_style(RGBColor(225, 225, 225))
        .axis_style(BLACK)
        .label_style(text(15))
        .axis_desc_style(text(17))
        .draw()?;
    for line in lines {
        let shown: Vec<_> = line.points.iter().map(|p| (scale(p.0), scale(p.1))).collect();
        let style = colour(line).stroke_width(2);
        match DASHES[line.look % DASHES.len()] {
            (_, 0) => chart.draw_series(LineSeries::new(shown.iter().copied(), style))?,
            (dash, gap) => {
                chart.draw_series(DashedLineSeries::new(shown.iter().copied(), dash, gap, style))?
            }
        };
        let every = shown.len().div_ceil(MARKERS).max(1);
        for (point, &(_, value, bar)) in shown.iter().zip(&line.points).rev().step_by(every) {
            if bar > 0.0 {
                // Beside each other, where lines are close.
                let aside = (line.look % COLOURS.len()) as i32 * 3 - 9;
                let ends = [value - bar, value + bar].map(|v| {
                    let (x, y) = chart.backend_coord(&(point.0, scale(v)));
                    (x + aside, y)
                });
                root.draw(&PathElement::new(ends, colour(line).stroke_width(1)))?;
            }
            let (x, y) = chart.backend_coord(point);
            mark(root, line, (x, y))?;
        }
    }
    names(root, &chart, lines, scale)
}

/// Writes the names beside the ends of the lines, apart from each other.
fn names(
    root: &Root<'_>,
    chart: &Chart<'_, '_>,
    lines: &[Line],
    scale: impl Fn(f64) -> f64,
) -> Drawn {
    const LINE: i32 = 21;
    let end =
        |line: &Line| line.points.last().map(|p| chart.backend_coord(&(scale(p.0), scale(p.1))));
    let mut ends: Vec<_> =
        lines.iter().filter_map(|line| end(line).map(|end| (line, end))).collect();
    ends.sort_by_key(|(_, (_, y))| *y);
    // Down as far as needed, then up from the bottom.
    let bottom = SIZE.1 as i32 - 70;
    let mut places: Vec<i32> = Vec::new();
    for (_, (_, y)) in &ends {
        places.push(places.last().map_or(*y, |above| (*y).max(above + LINE)));
    }
    let mut limit = bottom;
    for place in places.iter_mut().rev() {
        *place = (*place).min(limit);
        limit = *place - LINE;
    }
    let left = SIZE.0 as i32 - NAMES as i32;
    for ((line, end), y) in ends.into_iter().zip(places) {
        let thin = colour(line).stroke_width(1);
        root.draw(&PathElement::new([end, (left + 12, y)], thin))?;
        mark(root, line, (left + 18, y))?;
        let style = (FONT, 16).into_font().color(&BLACK);
        let style = style.pos(Pos::new(HPos::Left, VPos::Center));
        root.draw(&Text::new(line.name.clone(), (left + 28, y), style))?;
    }
    Ok(())
}

fn mark(root: &Root<'_>, line: &Line, at: (i32, i32)) -> Drawn {
    let (filled, outlined) = (colour(line).filled(), colour(line).stroke_width(2));
    match line.look % 6 {
        0 => root.draw(&Circle::new(at, 4, filled))?,
        1 => root.draw(&TriangleMarker::new(at, 6, filled))?,
        2 => root.draw(&Rectangle::new([(at.0 - 4, at.1 - 4), (at.0 + 4, at.1 + 4)], filled))?,
        3 => root.draw(&Cross::new(at, 4, outlined))?,
        4 => root.draw(&Circle::new(at, 4, outlined))?,
        _ => root.draw(&Rectangle::new([(at.0 - 4, at.1 - 4), (at.0 + 4, at.1 + 4)], outlined))?,
    }
    Ok(())
}

fn colour(line: &Line) -> RGBColor {
    COLOURS[line.look % COLOURS.len()]
}

/// The range of values, with a part of it added at both ends.
fn range(values: impl Iterator<Item = f64>, margin: f64) -> (f64, f64) {
    let (low, high) = values
        .filter(|v| v.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    if low > high {
        return (0.0, 1.0);
    }
    let margin = if high > low { (high - low) * margin } else { low.abs().max(1.0) * 0.01 };
    (low - margin, high + margin)
}

/// Digits behind the point that tell values this far apart.
fn decimals(step: f64) -> usize {
    (-step.log10().floor()).clamp(0.0, 8.0) as usize
}

/// A number in three digits or so.
fn short(value: f64) -> String {
    match value {
        10.0.. => format!("{value:.0}"),
        1.0.. => format!("{value:.1}"),
        _ => format!("{value:.2e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plots_name_their_lines_and_axes() {
        let line = |name: &str, look, offset: f64| Line {
            name: name.into(),
            points: (1..40).map(|x| (f64::from(x), offset + 1.0 / f64::from(x), 0.01)).collect(),
            look,
        };
        let lines = [line("one", 0, 1.0), line("two", 1, 1.0), line("three", 9, 1.001)];
        for logarithmic in [false, true] {
            let axes = Axes { x: "tokens (millions)", y: "loss (nats)", logarithmic };
            let svg = draw(&lines, &axes).unwrap();
            for text in ["<svg", "one", "two", "three", "tokens (millions)", "loss (nats)"] {
                assert!(svg.contains(text), "{text} is missing");
            }
            assert!(svg.trim_end().ends_with("</svg>"));
            assert!(!svg.contains("NaN"));
        }
        assert!(draw(&[], &Axes { x: "x", y: "y", logarithmic: false }).is_ok());
    }

    #[test]
    fn numbers_have_the_digits_that_matter() {
        assert_eq!(decimals(0.013), 2);
        assert_eq!(decimals(12.0), 0);
        assert_eq!((short(8192.0), short(1.25)), ("8192".into(), "1.2".into()));
    }
}
