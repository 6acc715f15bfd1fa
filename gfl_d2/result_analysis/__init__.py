from .analysis import ResultAnalysis, analyze_results
from .fitting import check_fitting, fit_calibration
from .report import format_comparison, format_report, write_report
from .result_set import HALVES, ResultSet, load_result_set
