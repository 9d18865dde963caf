"""Run folder, runner, controls, findings, figures and report: what every experiment needs."""
