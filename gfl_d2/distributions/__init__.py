from .detection import detect_with_distributions, ground_truth, match_ground_truth
from .page import make_page
from .picture import draw_distributions
